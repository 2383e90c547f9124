"""Several processes or several devices: one technique a file. Knows torch and Accelerate, and no model of ours."""
