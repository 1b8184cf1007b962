"""`SparsityConfig`: every choice of a pruning run, documented once, checked once, never mutated."""

import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hf_sparse.errors import SparsityError


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SparsityConfig:
    """What to remove and how the gates learn it; `HfArgumentParser` turns every field into a flag.

    Raises:
        SparsityError: a value is outside its range or not among its choices.
    """

    target: float = _option(
        0.5, "Fraction of the prunable cost (attention heads and FFN neurons) to remove, between 0 and 1."
    )
    cost: Literal["params", "macs"] = _option(
        "params", "What a head or neuron costs: its parameters, or its multiply-accumulates per token."
    )
    cost_sequence_length: int = _option(128, "Tokens per sequence that --cost macs counts attention scores for.")
    gate: Literal["relative", "simplex"] = _option(
        "relative", "Gate function of arXiv:1910.03201: bounded and relative, or normalised on a simplex."
    )
    group: Literal["kind", "layer"] = _option(
        "kind", "Who competes: all heads (and all neurons) of the model, or those of each layer on their own."
    )
    layout: Literal["free", "uniform"] = _option(
        "free",
        "Sizes of layers: each its own, or the same in all, so that the stock class loads them; then --group is layer.",
    )
    t0: float = _option(0.05, "Threshold every gate starts from, between 0 and 1; gates are exactly 1 whatever it is.")
    p: float = _option(0.5, "Exponent of the p-norm penalty, between 0 and 1.")
    gate_learning_rate: float = _option(0.1, "Learning rate of the gates; their weight decay is always 0.")
    sparsity_warmup: float = _option(0.01, "Share of the steps before the penalty starts.")
    sparsity_ramp: float = _option(0.24, "Share of the steps over which the density descends to its target.")
    sparsity_hold: float = _option(
        0.05, "Share of the steps that may go by until the structure is fixed; the learning rate decays after it."
    )
    controller_gain: float = _option(
        40.0, "How strongly the multiplier lambda answers a density above its schedule, integrated over the ramp."
    )
    distillation_weight: float = _option(
        0.5, "Weight of the teacher's logits against the labels, between 0 and 1; unused without a teacher."
    )
    distillation_temperature: float = _option(2.0, "Temperature at which student and teacher logits are compared.")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for option in fields(self):
            choices = typing.get_args(hints[option.name])
            value = getattr(self, option.name)
            if choices and value not in choices:
                raise SparsityError(f"unknown {option.name} {value!r}: choose one of {', '.join(choices)}")
        for name in ("target", "t0", "p"):
            if not 0 < getattr(self, name) < 1:
                raise SparsityError(f"{name} is {getattr(self, name)}: give a number between 0 and 1, both excluded")
        for name in ("gate_learning_rate", "controller_gain", "distillation_temperature", "cost_sequence_length"):
            if not getattr(self, name) > 0:
                raise SparsityError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not 0 <= self.distillation_weight <= 1:
            raise SparsityError(f"distillation_weight is {self.distillation_weight}: give a number from 0 to 1")
        shares = (self.sparsity_warmup, self.sparsity_ramp, self.sparsity_hold)
        if min(shares) < 0 or self.sparsity_ramp == 0 or not sum(shares) < 1:
            raise SparsityError(
                f"sparsity_warmup, sparsity_ramp and sparsity_hold are {shares}: give shares of the steps, not "
                "negative, with a ramp above 0 and a sum below 1 (the rest is recovery)"
            )
