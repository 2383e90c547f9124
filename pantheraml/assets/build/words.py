# ruff: noqa: SIM905 - a word list reads better as words than as a list of quoted strings
"""The words from which every sentence of the demo is made, and a random source that is the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NAMES = (
    "Maria Oliver Aisha Kenji Sofia Lucas Fatima Noah Elena Omar Priya Jonas Mei Carlos Ingrid Tariq Amara Felix Yuki "
    "Clara Diego Hanna Samir Leila Marco Nadia Erik Rosa Kofi Vera Anton Zara Pablo Greta Ravi Lina Hugo Ines Malik "
    "Freya Tomas Selma Andre Mina Oscar Petra Idris Laura Viktor Chloe Mateo Astrid Bruno Daria Emil Farah Gavin "
    "Helga Ivan Julia Karim Luisa Milan Nora Otto Paula Quentin Rita Simon Tessa Umar Viola Walter Xenia Yusuf Zoe "
    "Adam Bella Conor Dina Edgar Fiona Georg Holly Isaac Jenny Kevin Lotte Martin Nina Abel Agnes Alba Alma Alvin "
    "Amina Anders Anika Arthur Asha Bashir Beata Bernard Bianca Boris Brenda Camila Cedric Celia Chen Cyrus Dalia "
    "Damian Deepa Dmitri Dorian Dylan Eileen Elias Elif Emma Enzo Esther Eva Fabio Felicia Finn Flora Frank Gareth "
    "Gemma Gloria Goran Hamza Harold Hassan Hector Helen Hiroshi Ibrahim Ida Imran Irene Irma Jack Jamal Janet Jasper "
    "Joanna Josef Juan Kaito Kamala Katrin Kenneth Lars Latif Leon Linda Lorenzo Lucy Lydia Magnus Mandla Marta "
    "Mikael Miriam Mohan Monica Nabil Naomi Nelson Niko Odette Olga Orhan Osman Paolo Penelope Philip Pilar Rahul "
    "Ramona Renata Rohan Roland Rosalind Ruben Rufus Sabine Sander Sarah Sergio Shirin Stella Stefan Sunita Tara "
    "Teresa Tobias Ulrich Uma Valeria Victor Wanda Wilma Yara Yvonne Zainab"
).split()

CITIES = (
    "Oslo Lima Cairo Tokyo Paris Berlin Nairobi Madrid Lagos Quito Hanoi Dublin Vienna Prague Lisbon Athens Warsaw "
    "Zurich Geneva Boston Denver Austin Seattle Toronto Havana Bogota Santiago Accra Dakar Tunis Rabat Amman Delhi "
    "Mumbai Dhaka Seoul Osaka Kyoto Sydney Perth Riga Vilnius Tallinn Split Zagreb Palermo Naples Turin Porto Bergen "
    "Malmo Turku Ghent Leeds Cardiff Belfast Hamburg Munich Cologne Graz Basel Nice Lyon Lille Adelaide Aleppo "
    "Algiers Ankara Antwerp Atlanta Auckland Baku Bamako Bangkok Barcelona Beirut Bilbao Bologna Bordeaux Bremen "
    "Bristol Brussels Budapest Calgary Canberra Caracas Chennai Chicago Cork Cordoba Dallas Damascus Darwin Doha "
    "Dresden Dubai Durban Edmonton Florence Fukuoka Galway Gdansk Genoa Glasgow Granada Guadalajara Halifax Harare "
    "Helsinki Houston Innsbruck Istanbul Izmir Jakarta Kampala Karachi Khartoum Kigali Kingston Kolkata Krakow Lahore "
    "Leipzig Linz Ljubljana Luanda Lucerne Lusaka Maputo Marseille Medellin Memphis Miami Minsk Mombasa Montreal "
    "Moscow Muscat Nantes Newcastle Odense Orlando Ottawa Panama Phoenix Portland Pune Recife Reykjavik Rome "
    "Rotterdam Salzburg Sapporo Seville Shanghai Singapore Skopje Stockholm Stuttgart Taipei Tampere Tbilisi Toulouse "
    "Trieste Tripoli Utrecht Valencia Venice Verona Windhoek Winnipeg York Zanzibar"
).split()

ITEMS = (
    "lamp chair table clock mirror carpet pillow blanket basket bottle cup plate bowl spoon kettle teapot candle vase "
    "frame desk stool sofa ladder hammer bucket broom rope tent kite drum flute guitar violin camera radio laptop "
    "notebook pencil marker folder stamp poster map book scarf hat coat glove belt shirt jacket boot ball helmet rocket"
).split()

COLORS = "red blue green black white brown grey pink purple orange yellow silver".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

NUMBERS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()

FIRST_NUMBER = 2

ONSETS = "b br c ch d dr f g gr h j k l m n p pl r s sh st t tr v w z".split()
VOWELS = "a e i o u ai ea oo".split()
CODAS = ["", "n", "r", "l", "s", "t", "m", "nd", "x"]


class Source:
    """Random choices that depend on the seed only.

    ``random.Random.random`` is the one method whose sequence Python guarantees between versions, so every choice is
    made from it.

    Args:
        seed: Any integer; the same seed gives the same choices on every machine.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def unit(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._random.random() * n)

    def pick(self, values: Sequence[T]) -> T:
        """One of ``values``."""
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """``count`` different positions of ``values`` in random order."""
        rest = list(values)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def invented(self) -> str:
        """A word of one to three syllables that need not exist."""
        return "".join(self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS) for _ in range(1 + self.below(3)))
