"""The presses that can be chosen and those that cannot, named without importing kvpress."""

from duo_id.common.errors import check
from duo_id.common.mistakes import did_you_mean

USUAL = (
    "snapkv",
    "tova",
    "observed",
    "expected",
    "ada-snapkv",
    "ada-expected",
    "duo-on-the-fly",
    "streaming-llm",
    "knorm",
)
NEWEST = (
    "keydiff",
    "lagkv",
    "cur",
    "leverage",
    "noncausal",
    "compactor",
    "cap",
    "critical-snapkv",
    "critical-expected",
    "critical-ada-snapkv",
    "kvcompose",
    "kvzip-plus",
    "kvgrad",
)
PRESSES = (*USUAL, "kvzip", "pyramidkv", "chunkkv", "critical-ada-expected", *NEWEST)
GROUPS = {"usual": USUAL, "newest": NEWEST, "all": PRESSES}  # names that stand for several

WEIGHTS = "needs weights trained for the model, from the hub"
REFUSED = {
    "kvzap": WEIGHTS,
    "fastkvzip": WEIGHTS,
    "restorekv": WEIGHTS,
    "qfilter": WEIGHTS,
    "expected-stats": "needs statistics of the model's queries, from the hub",
    "lukv": "needs budgets of each head, which are published for a single model, from the web",
    "finch": "compresses after the question",
    "cam": "evicts while it writes, not before the question",
    "dms": "evicts below a threshold, so it has no budget",
    "simlayerkv": "evicts above a threshold, so it has no budget",
    "think": "drops channels of keys, not tokens, and frees no memory",
}


def chosen(names: str) -> list[str]:
    """The presses of a list such as `newest,snapkv`, each once.

    Raises:
        UserError: a name is none of a press or group, or of a press that cannot be compared.
    """
    given, known = [name.strip() for name in names.strip("[] ").split(",")], (*PRESSES, *GROUPS)
    for name in given:
        check(name not in REFUSED, f"presses={name}: {name} {REFUSED.get(name)}; leave it out")
        hint = did_you_mean(name.lower(), (*known, *REFUSED))
        check(name in known, f"presses={name}: choose among {', '.join(known)}{hint}")
    return list(dict.fromkeys(press for name in given for press in GROUPS.get(name, (name,))))
