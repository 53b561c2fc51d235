"""Mixup and CutMix on a batch: timm's, for batches of any size and for samples without labels."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor


class BatchMixer:
    """Mixes the images of a batch with one another, and their labels to match.

    The draws come from numpy's global generator, as timm makes them, so a trainer's saved random state covers them.

    Args:
        mixup_alpha, cutmix_alpha: strengths; at least one above 0.
        prob: probability that a batch is mixed.
        switch_prob: probability of CutMix when both are on.
        num_classes: K.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float,
        switch_prob: float,
        num_classes: int,
    ) -> None:
        self._mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=0.0,  # the loss smooths, labels of either kind
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mixed images (B, C, H, W), and targets (B, K) if there are labels (B,); the arguments are left as they were.

        Raises:
            ValueError: if some samples have a label and others do not (their mixture would have half a target), and
                for labels of K and above.
        """
        if labels is not None:
            # One look at the device's values for both checks.
            lowest, highest = (-1, -1) if labels.is_floating_point() else torch.stack(labels.aminmax()).tolist()
            if lowest < 0:
                raise ValueError(
                    "Mixup and CutMix need one class index for every sample, and this batch has samples without (or "
                    "with soft) labels: label all of them, or set ce_weight=0 to train without labels."
                )
            if highest >= self._mixup.num_classes:
                raise ValueError(
                    f"Mixup and CutMix make targets over {self._mixup.num_classes} classes, and this batch has the "
                    f"label {highest}: labels must be below the class count, which the student declares as "
                    "`num_classes` (or config.num_labels)."
                )
        images = images.clone()
        target_labels = torch.zeros(len(images), dtype=torch.long, device=images.device) if labels is None else labels
        # timm pairs a batch with its reverse and insists on an even size; the last of an odd one stays as it is.
        even = len(images) - len(images) % 2
        parts = [self._mixup(images[:even], target_labels[:even])] if even else []
        if even < len(images):
            enabled, self._mixup.mixup_enabled = self._mixup.mixup_enabled, False
            pair = self._mixup(images[even:].repeat(2, 1, 1, 1), target_labels[even:].repeat(2))
            self._mixup.mixup_enabled = enabled
            parts.append((pair[0][:1], pair[1][:1]))
        mixed = torch.cat([part[0] for part in parts])
        return mixed, None if labels is None else torch.cat([part[1] for part in parts])
