"""Losses of a student against its dense teacher: tensors in, tensors out."""

from torch import Tensor
from torch.nn import functional as F


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distance between the predictions of student and teacher, one per item.

    KL(teacher || student) of the logits divided by the temperature T, times T^2 so that its gradients keep their
    scale (Hinton et al., arXiv:1503.02531, section 2). With a single output, a regression, the squared difference.

    Args:
        student: logits, shape (..., labels).
        teacher: logits, shape (..., labels).
        temperature: T, above 0.

    Returns:
        Losses, shape (...,).
    """
    if student.shape[-1] == 1:
        return (student.float() - teacher.float()).square().squeeze(-1)
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2
