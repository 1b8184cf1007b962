"""`SparsityConfig`: every option of a pruning run, documented once, checked once, never changed."""

import typing
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from hf_sparse.errors import SparsityError


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check(config: Any) -> None:
    """Raise `SparsityError` for a value that is not among the choices of its field."""
    hints = typing.get_type_hints(type(config))
    for option in fields(config):
        value = getattr(config, option.name)
        kinds = [hints[option.name], *typing.get_args(hints[option.name])]  # it may be one of several, such as None
        choices = [one for kind in kinds if typing.get_origin(kind) is Literal for one in typing.get_args(kind)]
        if choices and value not in choices and not (value is None and type(None) in kinds):
            raise SparsityError(f"unknown {option.name} {value!r}: choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class DistillationConfig:
    """How a model learns from its teacher; `HfArgumentParser` turns every field into a flag.

    Raises:
        SparsityError: a value is outside its range.
    """

    distillation_weight: float = _option(
        0.5, "Weight of the teacher's logits against the labels, from 0 to 1; with 1 no labels are needed."
    )
    distillation_temperature: float = _option(2.0, "Temperature at which student and teacher logits are compared.")
    hidden_distillation_weight: float = _option(
        20.0, "Weight of the relative squared error to the teacher's hidden states; 0 compares logits alone."
    )
    cache_teacher: bool = _option(
        False, "Remember the teacher's outputs for each row, for data that is the same in every epoch."
    )

    def __post_init__(self) -> None:
        if not self.distillation_temperature > 0:
            raise SparsityError(f"distillation_temperature is {self.distillation_temperature}: give a number above 0")
        if not 0 <= self.distillation_weight <= 1:
            raise SparsityError(f"distillation_weight is {self.distillation_weight}: give a number from 0 to 1")
        if not self.hidden_distillation_weight >= 0:
            raise SparsityError(
                f"hidden_distillation_weight is {self.hidden_distillation_weight}: give 0 or a number above it"
            )


@dataclass(frozen=True)
class SearchConfig(DistillationConfig):
    """How gates search for what is removed: schedule and learning; `HfArgumentParser` turns every field into a flag.

    Raises:
        SparsityError: a value is outside its range.
    """

    target: float = _option(0.5, "Share of the prunable cost to remove, between 0 and 1.")
    t0: float = _option(0.05, "Threshold every gate starts from, between 0 and 1; gates are exactly 1 whatever it is.")
    p: float = _option(0.5, "Exponent of the p-norm penalty, between 0 and 1.")
    gate_learning_rate: float = _option(
        0.1,
        "Learning rate of the gates, with --group model less where the descent takes fewer than 50 steps; their weight "
        "decay is always 0.",
    )
    warm_start: float | None = _option(
        None,
        "Importances start at this power of how much the loss depends on what each gate scales, estimated on a few "
        "rows; with 0 all start alike. By default 0.5 for heads and neurons, or 1 if more than nine tenths are "
        "removed or with --group model, and 1 for single weights.",
    )
    sparsity_warmup: float = _option(0.01, "Share of the steps before the penalty starts.")
    sparsity_ramp: float = _option(0.12, "Share of the steps over which the density descends to its target.")
    sparsity_hold: float = _option(
        0.05, "Share of the steps that the search may take after the descent; the learning rate decays after it."
    )
    controller_gain: float = _option(
        40.0, "How strongly the multiplier lambda grows while the density is above its schedule, over one ramp."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target", "t0", "p"):
            if not 0 < getattr(self, name) < 1:
                raise SparsityError(f"{name} is {getattr(self, name)}: give a number between 0 and 1, both excluded")
        if self.warm_start is not None and not self.warm_start >= 0:
            raise SparsityError(f"warm_start is {self.warm_start}: give 0 or a number above it")
        for name in ("gate_learning_rate", "controller_gain"):
            if not getattr(self, name) > 0:
                raise SparsityError(f"{name} is {getattr(self, name)}: give a number above 0")
        shares = (self.sparsity_warmup, self.sparsity_ramp, self.sparsity_hold)
        if min(shares) < 0 or self.sparsity_ramp == 0 or not sum(shares) < 1:
            raise SparsityError(
                f"sparsity_warmup, sparsity_ramp and sparsity_hold are {shares}: give shares of the steps, not "
                "negative, with a ramp above 0 and a sum below 1 (the rest is recovery)"
            )

    @property
    def density(self) -> float:
        """The share of the cost that is kept."""
        return 1.0 - self.target

    @property
    def descent(self) -> tuple[float, ...]:
        """The targets of the stages of a run, ascending."""
        return (self.target,)

    @property
    def shares_target(self) -> bool:
        """Whether kinds share the target, and each follows a schedule of its own."""
        return False


@dataclass(frozen=True)
class SparsityConfig(SearchConfig):
    """What to remove and how the gates learn it; `HfArgumentParser` turns every field into a flag.

    Raises:
        SparsityError: a value is outside its range or not among its choices.
    """

    target: float = _option(
        0.5, "Share of the prunable cost (attention heads and FFN neurons) to remove, between 0 and 1."
    )
    target_of: Literal["prunable", "all"] = _option(
        "prunable",
        "What --target is a share of: the cost of what can be pruned, or of the whole model, with its embeddings and "
        "head; for --cost params and macs.",
    )
    targets: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several targets, ascending: one run descends from one to the next and leaves a model at each; "
            "--target is then not used."
        },
    )
    target_speedup: float | None = _option(
        None,
        "Instead of --target: how many times as fast the model becomes on this device, such as 2.0; needs --cost "
        "latency.",
    )
    cost: Literal["params", "macs", "latency", "memory"] = _option(
        "params",
        "What a head or neuron costs: its parameters; or what these and its part of a decoder's cache take of memory; "
        "or, on a batch of your data, its multiply-accumulates or its share of the time, which is first measured on "
        "this device for sublayers of all sizes.",
    )
    cost_batch_size: int = _option(
        32,
        "Rows of the batch that --cost macs counts on and --cost latency measures, and of the cache of --cost memory.",
    )
    cost_sequence_length: int | None = _option(
        None,
        "Tokens per text of that batch, by default as many as in the data, or 128 where there are none; for --cost "
        "memory the tokens in the cache, by default 2,048.",
    )
    round_to: int | None = _option(
        None,
        "Round up the heads and neurons that stay, so that projections read a multiple of this number of channels, "
        "such as the group size of a quantizer; 0, with --cost latency, for the multiple that is fastest on this "
        "device. By default 32, or 8 where few neurons stay, in models at least 256 wide.",
    )
    gate: Literal["relative", "simplex"] = _option(
        "relative", "Gate function of arXiv:1910.03201: bounded and relative, or normalised on a simplex."
    )
    group: Literal["kind", "layer", "model"] | None = _option(
        None,
        "Which units compete: all heads (and all neurons) of the model ('kind'), or those of each layer; with 'model' "
        "heads and neurons share the target by what they do for the loss per cost, and the density follows its "
        "schedule however short that is. By default 'model' where a head has more than 150 times the parameters of a "
        "neuron, as in most recent decoders, else 'kind'.",
    )
    sublayer_gates: bool = _option(
        False, "Gate whole attention and FFN sublayers as well; a unit is then scaled by its gate times its sublayer's."
    )
    exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Blocks that are not pruned, by name or pattern, such as vision_tower or *.layers.0.*; costs and "
            "target then count only the other blocks. Frozen blocks are never pruned."
        },
    )
    include: list[str] | None = field(
        default=None, metadata={"help": "The only blocks to prune, by name or pattern, such as *.mlp."}
    )
    layout: Literal["free", "uniform"] = _option(
        "free",
        "Sizes of layers: free, or the same in all, so that the stock class loads the model; --group is then layer.",
    )
    refit: bool = _option(
        True,
        "Fit output projections to the teacher's by least squares when the model shrinks, unless that is late in the "
        "run.",
    )
    keep_adapter: bool = _option(
        False,
        "Save a model that was trained with an adapter of peft without it, and the adapter beside it in 'adapter', "
        "rather than merged into the weights.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)
        for name in ("targets", "exclude", "include"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise SparsityError(f"{name} is {given!r}: give a list, such as [{given!r}]")
            if given is not None:
                object.__setattr__(self, name, list(given))  # as it is read back from JSON
        if (
            not self.descent
            or list(self.descent) != sorted(set(self.descent))
            or not all(0 < target < 1 for target in self.descent)
        ):
            raise SparsityError(f"targets are {self.targets}: give ascending numbers between 0 and 1, both excluded")
        if self.sublayer_gates and self.layout == "uniform":
            raise SparsityError("a uniform layout keeps every sublayer: sublayer_gates need layout='free'")
        if self.shares_target and not self.may_share_target:
            raise SparsityError(
                "group='model' steers every kind by itself: leave layout, gate and sublayer_gates at their defaults"
            )
        if self.target_speedup is not None and not self.target_speedup > 1:
            raise SparsityError(f"target_speedup is {self.target_speedup}: give a number above 1, such as 2.0")
        if self.target_speedup is not None and (self.cost != "latency" or self.targets is not None):
            raise SparsityError("target_speedup needs cost='latency', and takes the place of target and targets")
        if self.target_of == "all" and (self.cost not in ("params", "macs") or self.target_speedup is not None):
            raise SparsityError("target_of='all' counts params or macs: for the time of the whole give target_speedup")
        if self.round_to is not None and (self.round_to < 0 or (self.round_to == 0 and self.cost != "latency")):
            raise SparsityError(
                f"round_to is {self.round_to}: give a number of at least 1, or 0 with cost='latency', which measures it"
            )
        for name in ("cost_batch_size", "cost_sequence_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SparsityError(f"{name} is {value}: give a number above 0")

    @property
    def descent(self) -> tuple[float, ...]:
        """The targets of the stages of a run, ascending."""
        return tuple(self.targets) if self.targets is not None else (self.target,)

    @property
    def shares_target(self) -> bool:
        """Whether kinds share the target, and each follows a schedule of its own."""
        return self.group == "model"

    @property
    def may_share_target(self) -> bool:
        """Whether nothing else that was asked for keeps kinds from sharing the target."""
        return not self.sublayer_gates and self.layout == "free" and self.gate == "relative"

    def stage(self, index: int) -> "SparsityConfig":
        """Return the settings of one stage, with the target of that stage only."""
        return replace(self, target=self.descent[index], targets=None)


@dataclass(frozen=True)
class WeightSparsityConfig(SearchConfig):
    """Which weights of linear layers become zero; their shapes stay. `HfArgumentParser` turns every field into a flag.

    Raises:
        SparsityError: a value is outside its range or not among its choices.
    """

    target: float = _option(0.5, "Share of the weights of linear layers that become zero, between 0 and 1.")
    pattern: Literal["unstructured", "block", "2:4"] = _option(
        "unstructured", "What a gate scales: a weight, a square block of weights, or a weight of which 2 in 4 stay."
    )
    block_size: int = _option(32, "Rows and columns of a block, for --pattern block.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)
        if self.pattern == "2:4" and self.target != 0.5:
            raise SparsityError(
                f"target is {self.target}: of four weights two stay with pattern='2:4', so leave it 0.5"
            )
        if self.block_size < 1:
            raise SparsityError(f"block_size is {self.block_size}: give a number of at least 1")
