import json
import random
import re

import datasets
import pytest
import zstandard

from duo_id.common.errors import UserError
from duo_id.data.haystack import REGIONS, load_haystack, tokenize, with_digest
from duo_id.data.settings import DataSettings, HaystackSettings

SPLITS = ("train", "validation", "test")
# 100 documents of 8 bytes, each followed by a blank line: document n is the bytes 10 n to 10 n + 8 of 1000
DOCUMENTS = [f"w{n:02d} z{n:02d}." for n in range(100)]


def text_of(haystack, tokenizer, num_tokens, seed=0):
    return tokenizer.decode(haystack.window(random.Random(seed), num_tokens, tokenizer))


def documents_in(text):
    return {int(number) for number in re.findall(r"w(\d\d) z\1\.", text)}


@pytest.mark.parametrize(("split", "expected"), [("train", (0, 70)), ("validation", (70, 85)), ("test", (85, 100))])
def test_regions_are_cut_by_position(make_haystack, tokenizer, split, expected):
    haystack = make_haystack(DOCUMENTS, split)
    seen = set().union(*(documents_in(text_of(haystack, tokenizer, 60, seed)) for seed in range(300)))
    assert seen == set(range(*expected))


def test_regions_cover_the_stream_once():
    assert [REGIONS[split] for split in SPLITS] == [(0, 0.7), (0.7, 0.85), (0.85, 1)]


def test_window_goes_on_into_the_next_documents_and_from_the_end_to_the_beginning(make_haystack, tokenizer):
    haystack = make_haystack(DOCUMENTS)  # its region is the bytes 0 to 700
    start_at = type("Fixed", (random.Random,), {"randrange": lambda self, *_: 678})()  # in z67
    text = tokenizer.decode(haystack.window(start_at, 50, tokenizer))
    assert text == "w68 z68.\n\nw69 z69.\n\n" + "\n\n" + "w00 z00.\n\nw01 z01.\n\nw02 z02."


def test_window_has_the_exact_number_of_tokens(make_haystack, any_tokenizer):
    haystack = make_haystack(["The fox sleeps. " * 10] * 50)
    rng = random.Random(1)
    for num_tokens in (0, 1, 7, 100, 1000):
        assert len(haystack.window(rng, num_tokens, any_tokenizer)) == num_tokens


def test_window_begins_with_a_whole_word(make_haystack, tokenizer):
    words = [f"<{n}>" for n in range(500)]
    haystack = make_haystack([" ".join(words)])
    starts = {text_of(haystack, tokenizer, 40, seed).split()[0] for seed in range(100)}
    assert starts <= set(words)
    assert len(starts) > 50  # random places, not always the same prefix


def test_window_survives_text_without_spaces_and_cut_characters(make_haystack, tokenizer):
    haystack = make_haystack(["針在草堆裡" * 200])
    for seed in range(5):
        assert set(text_of(haystack, tokenizer, 300, seed)) <= set("針在草堆裡")


def test_window_depends_on_the_rng_alone(make_haystack, tokenizer):
    first, second = (make_haystack(DOCUMENTS) for _ in range(2))
    assert text_of(first, tokenizer, 99, seed=5) == text_of(second, tokenizer, 99, seed=5)


def test_window_tokenises_little_more_than_it_needs(make_haystack, tokenizer, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "duo_id.data.haystack.tokenize", lambda _, text: sizes.append(len(text)) or tokenize(tokenizer, text)
    )
    make_haystack(["word " * 100_000]).window(random.Random(0), 100, tokenizer)
    assert sum(sizes) < 1000


def test_text_that_looks_like_a_special_token_is_text(bos_tokenizer):
    assert bos_tokenizer.bos_token_id not in tokenize(bos_tokenizer, "a <s> b </s>")


def test_too_short_region_says_how_many_tokens_there_are(make_haystack, tokenizer):
    with pytest.raises(
        UserError, match=r"validation part has about 1\d\d tokens.* 500: lower data.length_max .*=packages"
    ):
        make_haystack(DOCUMENTS, "validation").window(random.Random(0), 500, tokenizer)


def test_reads_count_how_often_windows_come_by(make_haystack, tokenizer):
    haystack = make_haystack(["word " * 2000], "test")  # 1500 bytes, a token each
    assert haystack.reads == 0
    for seed in range(30):
        haystack.window(random.Random(seed), 500, tokenizer)
    assert haystack.reads == pytest.approx(30 * 500 / 1500, rel=0.05)


def test_digest_is_of_all_text_and_of_where_documents_end(make_haystack):
    digest = make_haystack(DOCUMENTS).digest
    assert digest == make_haystack(DOCUMENTS, "test").digest, "of the text, not of a region"
    assert make_haystack([*DOCUMENTS[:-1], "w99 z98."]).digest != digest
    assert make_haystack(["w00", " z00.", *DOCUMENTS[1:]]).digest != digest


def test_text_with_another_digest_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS))
    settings = with_digest(DataSettings(haystack=HaystackSettings("file", path=str(tmp_path / "text.txt"))))
    for split in SPLITS:
        assert load_haystack(settings.haystack, split).digest == settings.haystack.sha256
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS[1:]))
    with pytest.raises(UserError, match=f"data.haystack.sha256={settings.haystack.sha256}: .*=file has the digest"):
        load_haystack(settings.haystack, "train")


def test_finished_samples_have_no_digest():
    settings = DataSettings(task="disk", path="anywhere")
    assert with_digest(settings) is settings


def test_packages_are_cut_into_regions_for_training_and_halves_for_evaluation(monkeypatch):
    texts = {"training": DOCUMENTS, "held-out": DOCUMENTS[:50]}
    monkeypatch.setattr("duo_id.data.haystack.package_docstrings", texts.__getitem__)
    settings = HaystackSettings("packages")
    borders = {
        (split, held_out): (haystack.start, haystack.stop, len(haystack.documents))
        for held_out, splits in ((False, SPLITS), (True, EVALUATION))
        for split in splits
        for haystack in [load_haystack(settings, split, held_out)]
    }
    assert borders == {
        ("train", False): (0, 700, 100),
        ("validation", False): (700, 850, 100),
        ("test", False): (850, 1000, 100),
        ("development", True): (0, 250, 50),
        ("test", True): (250, 500, 50),
    }


def test_embedded_is_english_and_splits_share_no_text(bos_tokenizer):
    haystacks = [load_haystack(HaystackSettings(), split) for split in SPLITS]
    borders = [(haystack.start, haystack.stop) for haystack in haystacks]
    assert borders[0][0] == 0
    assert borders[0][1] == borders[1][0]
    assert borders[1][1] == borders[2][0]
    assert borders[2][1] > 400_000
    assert " the " in text_of(haystacks[0], bos_tokenizer, 1000)


EVALUATION = ("development", "test")


@pytest.mark.parametrize(("split", "region"), [("development", "validation"), ("test", "test")])
def test_evaluation_reads_of_text_for_training_what_training_does_not(make_haystack, split, region):
    start, stop = REGIONS["train"]
    assert REGIONS[split] == REGIONS[region]
    assert REGIONS[split][0] >= stop > start
    ours, theirs = load_haystack(HaystackSettings(), split), load_haystack(HaystackSettings(), region)
    assert (ours.start, ours.stop) == (theirs.start, theirs.stop)


def test_library_is_cut_in_halves(bos_tokenizer):
    development, test = (load_haystack(HaystackSettings("library"), split) for split in EVALUATION)
    total = int(development.ends[-1])
    assert (development.start, development.stop, test.start, test.stop) == (
        0,
        round(total / 2),
        round(total / 2),
        total,
    )
    assert " the " in text_of(development, bos_tokenizer, 1000)
    assert total > 800_000


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_on_the_library_is_refused(split):
    with pytest.raises(
        UserError, match=r"data.haystack.source=library is reserved for evaluation: train on .*=embedded"
    ):
        load_haystack(HaystackSettings("library"), split)


def write(path, kind):
    """Write DOCUMENTS under `path` as a file of this kind, with the column `story`."""
    rows = "".join(json.dumps({"n": n, "story": document}) + "\n" for n, document in enumerate(DOCUMENTS))
    file = path / f"stories.{kind}"
    if kind == "jsonl":
        file.write_text(rows)
    elif kind == "jsonl.zst":
        file.write_bytes(zstandard.compress(rows.encode()))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"story": DOCUMENTS}).to_parquet(file)
    else:
        file.write_text("\n\n".join(DOCUMENTS))
    return file


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.zst", "parquet"])
def test_files_of_all_kinds_read_alike_from_the_memory_map(tmp_path, make_haystack, tokenizer, kind):
    file = write(tmp_path, kind)
    settings = HaystackSettings(source="file", path=str(file), text_key="text" if kind == "txt" else "story")
    haystack = load_haystack(settings, "test")
    assert haystack.documents.source.cache_files  # on disk
    assert text_of(haystack, tokenizer, 90) == text_of(make_haystack(DOCUMENTS, "test"), tokenizer, 90)
    folder = load_haystack(HaystackSettings("file", path=str(tmp_path), text_key=settings.text_key), "test")
    assert text_of(folder, tokenizer, 90) == text_of(haystack, tokenizer, 90)


def test_hub_asks_for_what_the_settings_name(monkeypatch, tokenizer):
    asked = {}

    def load_dataset(*args, **options):
        asked.update(args=args, **options)
        return datasets.Dataset.from_dict({"chapter": [*DOCUMENTS[:50], None, *DOCUMENTS[50:]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = HaystackSettings("hub", id="some/books", name="long", split="all", revision="v1", text_key="chapter")
    assert documents_in(text_of(load_haystack(settings, "train"), tokenizer, 300))
    assert asked == {"args": ("some/books", "long"), "split": "all", "revision": "v1"}


def test_unreachable_hub_points_to_the_embedded_text(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data.haystack.id=some/books.*no route to host.*source=embedded") as caught:
        load_haystack(HaystackSettings("hub", id="some/books"), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "text_key", "message"),
    [
        ("none.txt", None, "text", "no such file"),
        ("some.pdf", b"x", "text", "use a txt, jsonl"),
        ("empty.txt", b"", "text", "is empty"),
        ("blank.txt", b"\n\n\n\n", "text", "cannot be read as text"),
        ("bad.jsonl", b"{oops\n", "text", "cannot be read as json"),
        ("bad.parquet", b"oops", "text", "cannot be read as parquet"),
        ("other.jsonl", b'{"a": "x", "b": 1}\n', "text", "text_key=text: .* has the columns a, b"),
        ("number.jsonl", b'{"a": "x", "b": 1}\n', "b", r"text_key=b of .*path=.*number\.jsonl is int64, not text"),
        ("void.jsonl", b'{"text": ""}\n', "text", r"path=.*void\.jsonl holds no text"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, text_key, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_haystack(HaystackSettings("file", path=str(tmp_path / name), text_key=text_key), "train")
    assert "data.haystack." in str(caught.value)
    assert "\n" not in str(caught.value)
