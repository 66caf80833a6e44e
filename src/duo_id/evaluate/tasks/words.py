"""The vocabulary of evaluation samples: no word is shared with training or between splits."""

import random
from dataclasses import dataclass

from duo_id.evaluate.items import SPLITS

_NOUNS = """
acorn album almond altar antler apron ash autumn bacon badger bagel bakery bamboo barley beam beaver beetle blossom
bolt bonnet boulder bracelet breeze brook bubble buckle buffalo bugle bulb cabbage cactus canal canvas captain cedar
cellar cereal chapel chisel cider cinnamon clover cobra cocoa compass copper coral cottage cricket crystal daisy drill
dune dwarf easel envelope faucet fern ferry fiddle flannel fossil fountain foxglove freight galaxy gallery gazelle
ginger girder glacier gramophone gravel griddle grove hamlet hammock harvest hazel heather hedge herring hinge
holly hornet iceberg igloo inkwell iris jasmine jelly jigsaw juniper kernel kettledrum lagoon lantern lattice laurel
lavender ledger lichen lilac linen lobster locket loom lotus lumber magpie mallet mango maple marble meadow melon
mitten mole monsoon mosaic moss moth mustard napkin needle nettle nutmeg oak oasis oatmeal olive onion orchard orchid
otter oyster paddle parade parcel parsley pasture pebble pelican pepper petal pickle pigeon pillar pine pistachio plum
pocket pond poppy porch prairie prism pumpkin puppet puzzle pyramid quail quarry quill quilt rabbit radish raft
raisin raspberry ravine razor reef ribbon ridge rooster rope ruby rudder saddle saffron salmon sandal sapphire satchel
saucer saxophone scarf scooter sequin shawl shed shovel shrimp silk skirt slate sled sleeve slipper snail sofa sparrow
spinach sponge spruce squid squirrel statue steeple stove straw sugar sunflower swamp sweater syrup tadpole tailor
tambourine tapestry teapot temple tent thimble thistle thorn throne thunder timber toad toffee tomato torch tractor
treasure trellis trout trumpet tulip tundra turnip turtle umbrella valley vanilla vase velvet village vine vinegar
violet violin volcano waffle wagon walnut walrus wardrobe wasp waterfall weasel wharf wheat whistle wicker willow
windmill wizard wreath yacht yarn yogurt zebra zipper
"""
_ADJECTIVES = """
ancient ashen azure bitter blunt bold brave brisk bronze calm charming cheap chilly clever cloudy coarse costly crimson
crooked curious curly damp dapper dashing deft delicate drowsy dusty eager earnest elegant fabled faded famous fearless
feeble fierce fluffy foggy fragile frosty fuzzy gaudy gentle gilded gleaming gloomy glossy graceful grand greedy grumpy
handsome hardy hasty hollow humble icy idle jagged jolly joyful keen kindly lanky lavish lazy lively lofty lonely
loud lucky lush majestic mellow merry mighty misty modest muddy narrow neat nimble noble noisy odd ornate pale
plump polished proud quaint queer quiet rapid ragged restless rosy rough royal rugged rusty scarlet shabby shiny
silent sleek sleepy slender slim smoky snug solemn spotted steep stern sticky stout striped sturdy sunny supple swift
tame tardy tender thrifty tidy timid tiny tranquil trusty upright vast velvety vivid wary weary wild windy wise witty
wooden woolly worn young zesty
"""
_CITIES = """
Accra Algiers Amsterdam Ankara Antwerp Athens Baghdad Bangkok Barcelona Basel Beirut Belgrade Bergen Bogota Bologna
Boston Bremen Bristol Brussels Bucharest Budapest Cairo Calcutta Caracas Cardiff Chicago Colombo Cologne Copenhagen
Cordoba Dakar Damascus Delhi Denver Dresden Dublin Edinburgh Florence Frankfurt Geneva Genoa Glasgow Granada Hamburg
Hanoi Havana Helsinki Istanbul Jakarta Kabul Karachi Kiev Krakow Kyoto Lagos Leipzig Lima Lisbon Liverpool Lyon Madrid
Manchester Manila Marseille Melbourne Milan Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Ottawa Oxford
Palermo Prague Quito Rabat Riga Rotterdam Santiago Seville Shanghai Sofia Stockholm Sydney Tallinn Tehran Toronto
Toulouse Tripoli Tunis Turin Valencia Venice Vienna Warsaw Zagreb Zurich
"""
_NAMES = """
Adele Agnes Albert Alice Alma Amos Anita Anton Arthur Astrid Barbara Basil Beatrice Bernard Bianca Boris Bruno Camille
Carmen Cecil Clara Claude Conrad Cora Cyril Daphne Dennis Dora Edgar Edith Elena Elmer Elsa Emil Erica Ernest Esther
Ethel Eugene Felix Fiona Flora Frida Gerda Gilbert Gloria Greta Gustav Hannah Harold Hector Heidi Helga Herbert Hilda
Hugo Ingrid Irene Isaac Ivan Jasper Jerome Joan Judith Julius Karin Klaus Laura Leon Leonora Lionel Lorenzo Louisa
Lucas Lydia Mabel Magnus Marcel Marina Martha Maurice Mildred Minerva Miriam Monica Muriel Nadia Nigel Norman Octavia
Olga Oscar Otto Pamela Patrick Paula Percy Petra Ralph Ramona Regina Rita Roland Rosalind Rufus Sabine Selma Silvia
Simon Stella Sylvester Tamara Thelma Theo Ulrich Ursula Vera Victor Vincent Viola Walter Wanda Wilfred Winifred Xavier
Yvonne Zelda
"""
_VOWELS = "aeiou"
_SYLLABLES = 3


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of one split.

    Attributes:
        nouns: common ones, for things that can be counted or owned.
        adjectives: that fit any of the nouns.
        cities: well-known ones.
        names: of people.
        consonants: of the split's made-up words.
    """

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    cities: tuple[str, ...]
    names: tuple[str, ...]
    consonants: str

    @property
    def num_made_up(self) -> int:
        """Number of possible made-up words."""
        return (len(self.consonants) * len(_VOWELS)) ** _SYLLABLES

    @property
    def num_things(self) -> int:
        """Number of possible things."""
        return len(self.adjectives) * len(self.nouns)

    def made_up(self, rng: random.Random, count: int) -> list[str]:
        """`count` different meaningless words, such as "dibolu"."""
        return [self._spell(number) for number in rng.sample(range(self.num_made_up), count)]

    def things(self, rng: random.Random, count: int) -> list[str]:
        """`count` different things, such as "rusty lantern"."""
        numbers = rng.sample(range(self.num_things), count)
        pairs = (divmod(number, len(self.nouns)) for number in numbers)
        return [f"{self.adjectives[adjective]} {self.nouns[noun]}" for adjective, noun in pairs]

    def _spell(self, number: int) -> str:
        word = ""
        for _ in range(_SYLLABLES):
            number, syllable = divmod(number, len(self.consonants) * len(_VOWELS))
            consonant, vowel = divmod(syllable, len(_VOWELS))
            word += self.consonants[consonant] + _VOWELS[vowel]
        return word


def _split(number: int, consonants: str) -> Vocabulary:
    """Every second word of each list."""
    lists = (words.split()[number :: len(SPLITS)] for words in (_NOUNS, _ADJECTIVES, _CITIES, _NAMES))
    nouns, adjectives, cities, names = map(tuple, lists)
    return Vocabulary(nouns, adjectives, cities, names, consonants)


VOCABULARIES = {"development": _split(0, "bdfgklm"), "test": _split(1, "nprstvz")}
