"""Letters of capitals, with worked-out solutions: a task that needs knowledge, and steps to put it together.

Write the first letters of the capitals of Peru, Japan and Kenya in this order.
Let's think step by step. The capital of Peru is Lima. Lima begins with L. The capital of Japan is Tokyo. Tokyo begins
with T. The capital of Kenya is Nairobi. Nairobi begins with N. The answer is L, T, N.

Each split has countries of its own, so that training teaches the steps and none of the capitals that the test needs.
Nor does it teach those of its own countries: `CAPITAL` finds them in a solution (cluster/real/anchored.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from cluster.real.sums import Problem, Split

ASKED = (2, 3)  # countries of a problem
CAPITAL = re.compile(r"(?<= is )[^.]+(?=\. )")  # a capital in a solution
SHARES: dict[Split, float] = {"train": 0.4, "validation": 0.2, "test": 0.4}  # of the countries
# 119 countries, none whose capital begins with the country's name.
_TABLE = """
Afghanistan: Kabul, Albania: Tirana, Algeria: Algiers, Angola: Luanda, Argentina: Buenos Aires, Armenia:
Yerevan, Australia: Canberra, Austria: Vienna, Azerbaijan: Baku, Bahrain: Manama, Bangladesh: Dhaka, Barbados:
Bridgetown, Belarus: Minsk, Belgium: Brussels, Belize: Belmopan, Bhutan: Thimphu, Botswana: Gaborone, Brazil:
Brasilia, Bulgaria: Sofia, Cambodia: Phnom Penh, Cameroon: Yaounde, Canada: Ottawa, Chad: N'Djamena, Chile:
Santiago, China: Beijing, Colombia: Bogota, Croatia: Zagreb, Cuba: Havana, Cyprus: Nicosia, Denmark: Copenhagen,
Ecuador: Quito, Egypt: Cairo, Eritrea: Asmara, Estonia: Tallinn, Ethiopia: Addis Ababa, Fiji: Suva, Finland:
Helsinki, France: Paris, Gabon: Libreville, Georgia: Tbilisi, Germany: Berlin, Ghana: Accra, Greece: Athens,
Guinea: Conakry, Guyana: Georgetown, Haiti: Port-au-Prince, Honduras: Tegucigalpa, Hungary: Budapest, Iceland:
Reykjavik, India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, Ireland: Dublin, Italy: Rome,
Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kenya: Nairobi, Kyrgyzstan: Bishkek, Laos: Vientiane, Latvia:
Riga, Lebanon: Beirut, Liberia: Monrovia, Libya: Tripoli, Lithuania: Vilnius, Madagascar: Antananarivo, Malawi:
Lilongwe, Malaysia: Kuala Lumpur, Mali: Bamako, Malta: Valletta, Mauritania: Nouakchott, Moldova: Chisinau,
Mongolia: Ulaanbaatar, Montenegro: Podgorica, Morocco: Rabat, Mozambique: Maputo, Namibia: Windhoek, Nepal:
Kathmandu, New Zealand: Wellington, Nicaragua: Managua, Niger: Niamey, Nigeria: Abuja, Norway: Oslo, Oman:
Muscat, Pakistan: Islamabad, Paraguay: Asuncion, Peru: Lima, Poland: Warsaw, Portugal: Lisbon, Qatar: Doha,
Romania: Bucharest, Russia: Moscow, Rwanda: Kigali, Saudi Arabia: Riyadh, Senegal: Dakar, Serbia: Belgrade,
Slovakia: Bratislava, Slovenia: Ljubljana, Somalia: Mogadishu, South Korea: Seoul, Spain: Madrid, Sudan:
Khartoum, Suriname: Paramaribo, Sweden: Stockholm, Syria: Damascus, Taiwan: Taipei, Thailand: Bangkok, Tunisia:
Tunis, Turkey: Ankara, Uganda: Kampala, Ukraine: Kyiv, Uruguay: Montevideo, Uzbekistan: Tashkent, Venezuela:
Caracas, Vietnam: Hanoi, Yemen: Sanaa, Zambia: Lusaka, Zimbabwe: Harare
"""


def capitals(split: Split) -> dict[str, str]:
    """The capital of each country of a split."""
    every = dict(entry.split(": ") for entry in " ".join(_TABLE.split()).split(", "))
    countries = sorted(every)
    random.Random("capitals").shuffle(countries)
    first = 0
    for name, share in SHARES.items():
        last = first + round(share * len(countries))
        if name == split:
            return {country: every[country] for country in countries[first : None if name == "test" else last]}
        first = last
    raise AssertionError(split)


def problems(split: Split) -> Iterator[Problem]:
    """The problems of a split, without end; always the same, and none comes twice."""
    known, generator, taken = capitals(split), random.Random(f"capitals {split}"), set[str]()
    while True:
        problem = _problem(known, generator.sample(sorted(known), generator.choice(ASKED)))
        if problem.question not in taken:
            taken.add(problem.question)
            yield problem


def _problem(known: dict[str, str], asked: list[str]) -> Problem:
    listed = f"{', '.join(asked[:-1])} and {asked[-1]}"
    steps = " ".join(
        f"The capital of {country} is {known[country]}. {known[country]} begins with {known[country][0]}."
        for country in asked
    )
    letters = [known[country][0] for country in asked]
    return Problem(
        f"Write the first letters of the capitals of {listed} in this order.",
        f"Let's think step by step. {steps} The answer is {', '.join(letters)}.",
        "".join(letters),
    )
