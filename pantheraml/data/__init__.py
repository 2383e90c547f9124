"""Data: sources, formats and conversations; knows no model class."""
