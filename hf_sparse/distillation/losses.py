"""Losses of a student against its dense teacher: tensors in, tensors out."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float, problem_type: str | None = None) -> Tensor:
    """Distance between the predictions of student and teacher, one per item.

    KL(teacher || student) of the logits divided by the temperature T, times T^2 so that its gradients keep their
    scale (Hinton et al., arXiv:1503.02531, section 2). Where labels do not exclude each other, the mean of that over
    labels that are or are not; in a regression, or with a single output, the squared difference.

    Args:
        student: logits, shape (..., labels).
        teacher: logits, shape (..., labels).
        temperature: T, above 0.
        problem_type: as transformers names it in a config; None for labels that exclude each other.

    Returns:
        Losses, shape (...,).
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1 or problem_type == "regression":
        return (student - teacher).square().mean(-1)
    student, teacher = student / temperature, teacher / temperature
    if problem_type == "multi_label_classification":
        likely = torch.sigmoid(teacher)
        ours, least = (F.binary_cross_entropy_with_logits(one, likely, reduction="none") for one in (student, teacher))
        return (ours - least).mean(-1) * temperature**2
    student, teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


SURE = 1e4
"""Logits of one who is sure of an answer; of all others, minus so much."""


def drawn_logits(teacher: Tensor, problem_type: str | None = None) -> Tensor:
    """Draw an answer to every item from the distribution that a teacher's logits are of.

    Where a student says what its teacher says, the distance between them has no slope in any direction. But the mean
    square of the slope of its distance to drawn answers is there the curvature of the distance: the Fisher information.

    Args:
        teacher: logits, shape (..., labels).
        problem_type: as in `logit_distillation`.

    Returns:
        Logits that are sure of the answer, shape (..., labels); where numbers are predicted, numbers of variance 1
        around the teacher's.
    """
    teacher = teacher.float()
    if teacher.shape[-1] == 1 or problem_type == "regression":
        return teacher + torch.randn_like(teacher)
    if problem_type == "multi_label_classification":
        drawn = torch.bernoulli(torch.sigmoid(teacher))
    else:
        drawn = F.one_hot(torch.distributions.Categorical(logits=teacher).sample(), teacher.shape[-1])
    return SURE * (2.0 * drawn - 1)


def drawn_states(teacher: Tensor) -> Tensor:
    """Draw states around those of a teacher, as far from them as they are large, shape (rows, ..., width)."""
    teacher = teacher.float()
    return teacher + teacher.square().mean().sqrt() * torch.randn_like(teacher)


def hidden_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """Distance between hidden states, each student layer against its teacher layer: a relative squared error.

    ||s - t||^2 / ||t||^2 over the tokens of a row, without its padding; the mean over rows, so that it does not depend
    on how they are batched, and over layers. The division makes one weight fit all models, whatever their scale.

    Args:
        student: states of the layers, shape (rows, ..., width) each.
        teacher: states of the teacher layers that belong to them, of the same shapes.
        masks: of every layer, 1 for tokens, 0 for padding, shape (rows, tokens); None without padding.

    Returns:
        The loss, shape ().
    """
    losses = []
    for ours, theirs, mask in zip(student, teacher, masks, strict=True):
        error, scale = (ours.float() - theirs.float()).square().mean(-1), theirs.float().square().mean(-1)
        if mask is not None and mask.shape == error.shape:  # other shapes: models that merge or add tokens
            error, scale = error * mask, scale * mask
        losses.append((error.flatten(1).sum(1) / scale.flatten(1).sum(1)).mean())
    return torch.stack(losses).mean()


def hidden_distances(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """`hidden_distillation` of every student layer against every teacher layer, shape (student, teacher layers)."""
    return torch.stack(
        [
            torch.stack([hidden_distillation([ours], [theirs], [mask]) for theirs in teacher])
            for ours, mask in zip(student, masks, strict=True)
        ]
    )


def layer_pairs(distances: Sequence[Sequence[float]]) -> tuple[tuple[int, int], ...]:
    """Which layer learns from which: the monotone matching of the smallest total distance.

    Every layer of the shallower side gets a partner, later ones get later ones, no two the same, and the last is with
    the last, since both feed the same head. Found exactly, by dynamic programming.

    Args:
        distances: of every student layer to every teacher layer.

    Returns:
        Pairs of student and teacher layers, ascending.
    """
    if len(distances) > len(distances[0]):
        transposed = [list(column) for column in zip(*distances)]
        return tuple((student, teacher) for teacher, student in layer_pairs(transposed))
    last = len(distances) - 1
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(distances[0]) + 1)
    for student, row in enumerate(distances):
        reached: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())]
        for teacher, distance in enumerate(row):
            cost, path = best[teacher]
            taken = (cost + distance, (*path, teacher))
            reached.append(taken if student == last else min(reached[-1], taken))
        best = reached
    return tuple(enumerate(best[-1][1]))
