"""Batch statistics in PyTorch: what the torch engine computes on its device, and what is traced for
other engines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bbt_accel.core.objective import MARGIN


def batch_statistics(label_logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """`objective.batch_statistics` in fp32: (P, N, C), one-hot targets (N, C), classes 0 … C-1 →
    float32 (P, 5).

    A logit that is not finite makes `target` NaN, be it the target's or another times 0. Of equal
    logits the first class is predicted, as by numpy's argmax; TensorRT's ArgMax does not guarantee
    that.
    """
    shifted = label_logits - label_logits.amax(2, keepdim=True)
    target = (shifted * targets).sum(2)
    ce = shifted.exp().sum(2).log() - target
    hinge = (torch.relu(shifted - target[..., None] + MARGIN) * (1 - targets)).sum(2)
    predicted, actual = torch.where(shifted == 0, classes, 1e6).amin(2), (targets * classes).sum(1)
    correct, positives = predicted == actual, predicted == 1
    columns = [ce, hinge, correct.float(), (correct & positives).float(), positives.float()]
    return torch.stack(columns, dim=2).sum(1)
