"""The words of needles, things and people for facts, and spelled-out ordinals."""

_NOUNS = """
anchor ankle ant apple arch arm arrow attic axe badge bag ball balloon banana band bank barn barrel basket bat bath
beach bead beak bean bear beard bed bee bell belt bench berry bike bird blade blanket block boat bone book boot bottle
bowl box boy brain branch bread brick bridge broom brush bucket bull bus bush butter button cabin cable cake camel
camera camp candle candy cane canoe cap car card carpet carrot cart castle cat cave chain chair chalk cheese cherry
chest chicken chimney chin church circle clay cliff clock cloth cloud clown coat coin collar comb cookie cork corn
cotton couch cow crab cradle crane cream crow crown cup curtain cushion deer desk diamond dice dish dog doll dolphin
donkey door dove dragon drawer dress drum duck eagle ear egg elbow elephant engine eye face fan farm feather fence
finger fire fish flag flame flask floor flower flute foot forest fork fox frame frog fruit fur garden gate ghost giant
glass globe glove goat gold goose grape grass guitar hair hammer hand harbor harp hat hawk heart helmet hen hill honey
hood hook horn horse hose hotel house island ivory jacket jar jewel judge jug kettle key king kitchen kite knee knife
knot ladder lake lamp leaf leather lemon letter lion lizard lock log magnet map mask mouse nail nest net nose nut
ocean oven owl page palm pan paper park pear pen pencil piano pig pillow
"""
_THINGS = """
alarm alibi ambition birthplace dream excuse formula goal greeting guess habit hobby joke motto nickname omen opinion
oath password plan plea prediction prize promise proverb recollection riddle rumour secret signal slogan surprise talent
theory verse wish
"""
_NAMES = """
Aaron Abel Ada Alan Amelia Andrea Anna Benjamin Bridget Carl Celia Charles Chloe Colin Daniel David Derek Diane Elias
Ellen Emma Eric Eva Frank Frederick Gavin Grace Gregory Helen Henry Ida Ian Jack James Jane Jason Jennifer Joseph Julia
Kate Kevin Leah Linda Louis Lucy Mark Martin Mary Michael Nancy Nathan Nina Noah Nora Oliver Owen Paul Peter Philip
Rachel
"""
WORDS = tuple(_NOUNS.split())
THINGS = tuple(_THINGS.split())  # that a person has one of
NAMES = tuple(_NAMES.split())

_ONES = """
first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
sixteenth seventeenth eighteenth nineteenth
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
MAX_ORDINAL = 99


def ordinal(number: int) -> str:
    """Spell out a number from 1 to 99: first, twelfth, twentieth, forty-second."""
    assert 1 <= number <= MAX_ORDINAL
    ones = ["", *_ONES.split()]
    if number < 20:
        return ones[number]
    tens = _TENS.split()[number // 10 - 2]
    return f"{tens}-{ones[number % 10]}" if number % 10 else f"{tens[:-1]}ieth"
