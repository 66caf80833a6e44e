"""What each setting may be, written down by hand and not read from the code.

In a list of values, `=` stands for nothing behind the equals sign; FILE, EMPTY, RUN and their kin for what lies in the
folder of a trial, see `tests.faults.places`.
"""

from dataclasses import dataclass

HUGE = "10000000000000000000000"
SHAPELESS = "[] [[0.5]] {} {a:{b:1}} [1,2] ??? ${oc.env:NOT_THERE} ${nothing.there}"  # where a plain value is asked for
WORDS = "abc = ☃ '1☃2' 0x -- 0.5.5"  # where a number is
PLAIN = "nan -1 abc ☃ true 1 [1] [[0.5]] ???"  # where names and values are


@dataclass(frozen=True)
class Domain:
    """The values of one setting: those that mean nothing there, and those that may mean something."""

    wrong: tuple[str, ...]
    odd: tuple[str, ...] = ()


def values(wrong: str, odd: str = "") -> Domain:
    """The values in two texts, each once."""
    wrongs, odds = (
        tuple("" if value == "=" else value for value in dict.fromkeys(one.split())) for one in (wrong, odd)
    )
    return Domain(wrongs, odds)


def whole(least: int = 0, most: int | None = None, null: bool = False) -> Domain:
    """A whole number; null: or none."""
    beyond = f"{least - 1} -1 -{HUGE} {HUGE}" + ("" if most is None else f" {most + 1}")
    return values(f"nan inf -inf 1e400 1.5 true {beyond} {SHAPELESS} {WORDS}" + " null" * (not null), "1e3 '3' 1_0")


def number(low: float = 0, high: float | None = None, open_low: bool = False, endless: bool = False) -> Domain:
    """A number from `low` on, or above it where `open_low`; infinity too where `endless`."""
    beyond = f"{low - 1} -1e300 -inf" + f" {low}" * open_low
    beyond += "" if high is None else f" {high + 0.5} 1e300 {HUGE}"
    beyond += "" if endless else " inf 1e400"
    odd = "1e-320 '0.5'" + ("" if high is not None else f" {HUGE} 1e300") + " inf 1e400" * endless
    return values(f"nan true {beyond} {SHAPELESS} {WORDS} null", odd)


def choice(*names: str) -> Domain:
    """One of some names."""
    return values(f"nan -1 0 true null {names[0].upper()} {names[0]}x {SHAPELESS} {WORDS}")


def flag(null: bool = False) -> Domain:
    """True or false; null: or neither."""
    return values(f"nan -1 2 1.5 inf {HUGE} {SHAPELESS} {WORDS}" + " null" * (not null), "1 0 yes off")


def text(wrong: str = "") -> Domain:
    """A text."""
    return values(f"{SHAPELESS} {wrong}", "nan -1 true ☃ a/../b")


def many(one: Domain, empty: bool = False) -> Domain:
    """A list of values; empty: or of none."""
    inner = " ".join(f"[{value}]" for value in one.wrong if value and value[0] not in "[{?$") + " []" * (not empty)
    return values(f"[[0.5]] {{}} {{a:{{b:1}}}} ??? null [null] [???] = ☃ [{{a:1}}] {inner}", "[1,1] '[1]'")


SHARE = number(0, 1)
MODEL = {
    "model.id": text("null"),
    "model.name": text(),
    "model.revision": text(),
    "model.wheel": text(),
    "model.init": choice("pretrained"),
    "model.dtype": choice("auto"),
    "model.weights": values(f"nan -1 0 true int5 INT8 {SHAPELESS} {WORDS}", "null"),
    "model.trust_remote_code": flag(),
    "model.architecture": values(f"{PLAIN} null {{}} {{model_type:abc}} {{abc:1}}"),
    "model.architecture.model_type": choice("llama"),
    "model.architecture.num_hidden_layers": whole(1),
    "model.architecture.num_attention_heads": whole(1),
    "model.architecture.num_key_value_heads": whole(1),
    "model.architecture.hidden_size": whole(1),
    "model.architecture.head_dim": whole(1),
    "model.architecture.intermediate_size": whole(1),
    "model.architecture.vocab_size": whole(1),
    "model.architecture.max_position_embeddings": whole(1),
    "+model.architecture.abc": values("1 [1] abc"),
    "model.config": values(f"{PLAIN} {{abc:1}} {{attn_implementation:abc}}", "{} null"),
    "+model.config.abc": values("1 [1] abc"),
    "+model.config.rope_parameters": values("abc 1 [1] {rope_type:abc}"),
}
HAYSTACK = {
    "data.haystack.source": choice("embedded"),
    "data.haystack.path": text(),
    "data.haystack.id": text(),
    "data.haystack.name": text(),
    "data.haystack.split": text("null ="),
    "data.haystack.revision": text(),
    "data.haystack.text_key": text("null ="),
    "data.haystack.sha256": text(),
}
DATA = HAYSTACK | {
    "data.task": choice("passkey"),
    "data.path": text(),
    "data.mixture": values(f"{PLAIN} {{passkey:nan}} {{passkey:-1}} {{passkey:inf}} {{passkey:abc}} {{passkey:[1]}}"),
    "data.length_min": whole(1),
    "data.length_max": whole(1, null=True),
    "data.num_lengths": whole(1),
    "data.curriculum": whole(0),
    "data.num_passkeys": whole(1),
    "data.passkey_words": whole(1),
    "data.num_questions": whole(1),
    "data.num_turns": whole(1),
    "data.answer_words": whole(1),
    "data.answer_tokens": whole(1),
    "data.text_skip": whole(0),
    "data.text_tokens": whole(1, null=True),
    "data.self_path": text(),
    "data.self_sha256": text(),
    "data.self_samples": whole(1),
    "data.self_share": number(0, 1, open_low=True),
    "data.self_tokens": whole(1),
    "data.self_temperatures": many(number(0, 10)),
    "data.self_seed": whole(0, 2**32 - 1),
    "data.self_chat": flag(null=True),
    "data.depth_min": SHARE,
    "data.depth_max": SHARE,
    "data.score": choice("answers"),
    "data.batch_size": whole(1),
    "data.padding_side": choice("right"),
    "data.num_workers": whole(0),
}
STEP = {
    "step.shape": choice("fast"),
    "step.memory": values(f"nan -1 0 inf true 60 60GB! -1GiB nanGiB infGiB 0GiB 1e400GiB null {SHAPELESS} {WORDS}"),
    "step.compile": flag(),
    "step.full_backend": choice("auto"),
    "step.streaming_backend": choice("auto"),
    "step.cuda_graphs": values(f"nan -1 2 1.5 inf null AUTO autox {HUGE} {SHAPELESS} {WORDS}", "1 0 yes off auto"),
    "step.length_multiple": whole(1),
    "step.sequence_parallel": whole(1),
    "step.shard": flag(),
}
WINDOW = {"method.sink_size": whole(0), "method.recent_size": whole(1)}
WEIGHTS = "null -1 nan true abc = [] [[0.5]] ??? {} {abc:1} {1:1}"
OBJECTIVE = values(
    f"{WEIGHTS} a.b os.system [kl] {{kl:nan}} {{kl:-1}} {{kl:inf}} {{kl:abc}} {{kl:0}} {{kl:null}} {{kl:[1]}} "
    "{kl:true}"
)
PENALTY = values(
    f"{WEIGHTS} [l1] {{l1:nan}} {{l1:-1}} {{l1:inf}} {{l1:abc}} {{l1:0}} {{l1:null}} {{l1:[1]}} {{l1:true}}"
)
ORDER = values("not/there = abc [1] 1 true nan {a:1} ??? [] {} FILE EMPTY BENCHMARK OTHER_HEADS {name:abc} {name:[1]}")
TWO = "[0.5] [0.9,0.1] [0,2] [nan,1] [-1,1] [] abc null {} [0,0.5,1] 0.5 [[0.1],[0.2]] [a,b] [true,true] ???"
SAMPLES = {"method.samples": whole(1)}
METHODS = {
    "random": WINDOW | {"method.name": choice("random"), "+method.samples": values("1 abc")},
    "saliency": WINDOW
    | SAMPLES
    | {
        "method.kind": choice("gradient"),
        "method.objective": OBJECTIVE,
        "method.tokens": choice("labelled"),
        "method.at": many(SHARE),
    },
    "search": WINDOW
    | SAMPLES
    | {
        "method.strategy": choice("elimination"),
        "method.objective": OBJECTIVE,
        "method.tokens": choice("labelled"),
        "method.start": ORDER,
        "method.between": values(TWO),
        "method.heads_per_round": whole(1),
        "method.swap_at": values("0 1 2 -1 nan inf abc = [0.5] {} true 0.5"),
        "method.max_swaps": whole(0),
        "method.swap_width": whole(1),
        "method.batch_tokens": whole(1, null=True),
    },
    "spans": WINDOW
    | {
        "method.samples": whole(0),
        "method.objective": OBJECTIVE,
        "method.tokens": choice("labelled"),
        "method.levels": values("[0] [-1] [8,nan] [a] abc 8 null {} [1.5] [true] [] [8,8]"),
        "method.budgets": values(TWO),
        "method.curvature_samples": whole(1),
        "method.start": ORDER,
    },
    "reconstruction": WINDOW | SAMPLES | {"method.reduction": choice("max")},
    "replay_gradient": WINDOW | SAMPLES | {"method.reduction": choice("max")},
    "duo": WINDOW
    | {
        "method.name": choice("duo"),
        "method.blend": choice("student"),
        "method.gate": choice("clamp"),
        "method.penalty": PENALTY,
        "method.objective": OBJECTIVE,
        "method.tokens": choice("labelled"),
        "method.initial": SHARE,
        "method.prior": ORDER,
        "method.prior_weight": number(0, open_low=True),
        "method.temperature": number(0, open_low=True),
        "method.target_sparsity": values("0.5 2 -1 nan abc = [0.5] {} true"),
        "method.target_rise": SHARE,
        "method.multiplier_lr": number(0, open_low=True),
        "method.reg_weight": number(0),
        "method.lr": number(0, open_low=True),
        "method.warmup": number(0, 0.5),
        "method.floor": SHARE,
        "method.optimizer": values(f"{PLAIN} {{_target_:abc}} {{_target_:os.getcwd}} {{abc:1}}"),
        "method.optimizer._target_": values(
            "abc = null 1 nan [a] torch.optim.Abc torch.nn.Linear os.getcwd {} ??? torch.optim"
        ),
        "method.optimizer.weight_decay": values("nan -1 abc = [] {} inf null ???"),
        "+method.optimizer.abc": values("1 abc null"),
    },
    "nested": WINDOW
    | {
        "method.budgets": values(f"{TWO} [1,1] [0,0]"),
        "method.penalty": values("binary target {l1:2}"),
        "method.reg_weight": values("1 0.5 nan -1"),
    },
}
DEVICES = "0 -2 nan abc = 1.5 {} [] [a] 1000 true null ??? [[0]] " + HUGE
CLASSES = "abc = null 1 nan [a] {} os.getcwd torch.nn.Linear ???"
TRAINER = {
    "trainer.max_steps": whole(1),
    "trainer.devices": values(DEVICES),
    "trainer.accelerator": values("abc = gpu tpu 1 nan [cpu] {} ??? true"),
    "trainer.precision": choice("32-true"),
    "trainer.val_check_interval": values(f"nan -1 0 abc [] {{}} inf ??? {HUGE}", "null 1.5"),
    "trainer.log_every_n_steps": values("nan -1 abc [] {} inf 1.5 ???", f"0 null {HUGE}"),
    "trainer.check_val_every_n_epoch": values("nan -1 0 abc [] {} 1.5 ???"),
    "trainer.num_sanity_val_steps": values("nan abc [] {} 1.5 ??? -2", "-1"),
    "trainer.enable_model_summary": values("abc [1] {a:1} nan ???", "1 null"),
    "trainer._target_": values(f"{CLASSES} lightning.Abc"),
    "+trainer.abc": values("1 null abc []"),
    "+trainer.max_epochs": values("1 abc null nan"),
    "+trainer.max_time": values("1 abc 00:00:00:01"),
    "+trainer.logger": values("true abc null {}"),
    "+trainer.plugins": values("abc [1] null"),
    "+trainer.callbacks": values("abc 1 [abc] [1] {a:1} {_target_:abc} [{_target_:os.getcwd}] nan"),
    "+trainer.accumulate_grad_batches": values("2 0 nan abc [] {}"),
    "+trainer.gradient_clip_val": values("nan abc [] {} -1", "0 1 inf"),
    "+trainer.limit_val_batches": values("nan -1 abc [] {} inf", "0 1"),
    "+trainer.limit_train_batches": values("nan -1 abc [] {} inf", "1"),
    "+trainer.strategy": values("abc 1 [a] {a:1} {_target_:abc} nan ="),
    "+trainer.default_root_dir": values("abc null 1"),
    "+trainer.fast_dev_run": values("abc nan [] {a:1} -1", "true 1"),
    "logger.csv": values("abc 1 [1] true nan {_target_:abc} {_target_:os.getcwd} {a:1} {} ???"),
    "+logger.csv.abc": values("1 abc []"),
    "checkpoint_seconds": number(0, endless=True),
}
SEED = {"seed": whole(0, 2**32 - 1)}
TRAIN = (
    MODEL
    | DATA
    | STEP
    | SEED
    | {
        "sparsity": many(SHARE),
        "repeats": whole(1),
        "comparison.samples": whole(1),
        "comparison.random_masks": whole(0),
        "comparison.validation_samples": whole(0),
        "resume": values("not/there = FILE EMPTY EVALUATION BENCHMARK [a] {} true 1 nan [[0.5]] ???"),
    }
)
HEADS = "not/there '' FILE EMPTY BENCHMARK [a] [] {} ??? 1 nan true a/b a/b@c SmolLM2-135M-Instruct OTHER_HEADS DATASET"
NAMES = "[] abc [abc] null {} [[abc]] = ??? [null] [1] nan ['']"
EVALUATE = (
    MODEL
    | HAYSTACK
    | SEED
    | {
        "heads": values(f"{HEADS} = EVALUATION null"),
        "data.path": text(),
        "tasks": values(f"{NAMES} [short,abc] [longbench/abc] [ruler-data/abc]"),
        "lengths": many(whole(1)),
        "samples": whole(1),
        "depths": whole(1),
        "sparsity": many(SHARE),
        "cache": many(number(0, 1, open_low=True), empty=True),
        "random_masks": whole(0),
        "baselines": values(NAMES.replace("[]", "[full]")),
        "patterns": values(
            f"{PLAIN} null {{full:HEADS}} {{random:HEADS}} {{a:not/there}} {{a:FILE}} {{a:EMPTY}} {{a:null}} {{a:''}} "
            "{a:[1]} {a:{b:1}} {a:not/*} {a:OTHER_HEADS}"
        ),
        "split": choice("test"),
        "kv": values(NAMES),
        "evict": values(NAMES.replace("[]", "[full]")),
        "evict_split": many(SHARE),
        "generate": flag(),
        "write": whole(0),
        "chat_template": flag(),
        "batch_tokens": whole(1, null=True),
        "chunk_size": whole(1),
        "peers": flag(),
        "resume": values("not/there = FILE EMPTY RUN BENCHMARK [a] {} true 1 nan [[0.5]] ???"),
    }
)
BENCHMARK = (
    MODEL
    | STEP
    | SEED
    | {
        "task": choice("decode"),
        "context": many(whole(1)),
        "data.length": whole(1, null=True),
        "chunk_size": many(whole(1)),
        "sparsity": many(SHARE),
        "spans": many(whole(1), empty=True),
        "shares": many(SHARE, empty=True),
        "heads": values(HEADS),
        "sink_size": whole(0),
        "recent_size": whole(1),
        "blend": values(NAMES),
        "kv": values(NAMES),
        "beside": flag(),
        "profile": flag(),
        "first_context": whole(1, null=True),
        "batch_size": whole(1),
        "trainer.devices": values(f"{DEVICES} 2"),
        "+trainer.abc": values("1 null"),
        "+trainer.max_steps": values("1"),
        "compare": values("not/there '' = FILE EMPTY EVALUATION BENCHMARK [a] {} ??? 1 nan true"),
        "compile": flag(null=True),
        "repeats": whole(1),
        "warmup": whole(0),
    }
)
DATA_GEN = (
    MODEL
    | DATA
    | SEED
    | {
        "out": values("'' = FILE EMPTY FILE/below null [a] {} ??? [[0.5]] /proc/made", "☃ nan 1"),
        "n": whole(0),
        "n_validation": whole(0),
        "n_test": whole(0),
    }
)
