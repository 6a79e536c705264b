"""The training loss of a network, with or without exits, at full width and at the narrower ones."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..forward.all_layers import all_layers
from ..forward.narrow import cut, narrow_config, narrow_shapes
from ..model import Model
from .config import TrainConfig
from .losses import BatchMeans, VarianceLoss, batch_means, loss_named


class Objective(nn.Module):
    """The training loss as one module, so that gradients can be averaged over processes."""

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__()
        self.model, self._loss = model, loss_named(config.loss)
        self.variance = None
        if model.backbone.learned_variance:
            self.variance = VarianceLoss(model.schedule, model.config.prediction_type)
        self._weights = config.uem_weight, config.ual_weight
        self._half = config.precision == "bfloat16"
        # in tuples, so that nn.Module does not register them: they have no weights of their own
        self._narrow = {width: self._at(width, config) for width in config.widths if width != 1}

    def _at(self, width: float, config: TrainConfig) -> tuple["Objective"]:
        """Objective of a narrow network on the meta device; its weights are passed at every call."""
        with torch.device("meta"):
            model = Model(narrow_config(self.model.config, width))
        made = Objective(model, dataclasses.replace(config, widths=[]))
        made.variance = self.variance
        return (made,)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        target: Tensor,
        whole: Tensor | None = None,
        width: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x, target (of the network's prediction): float [B, C, H, W]; t: float [B]; labels: int64 [B], or text, float
        [B, N, E]. whole: [2, L], `means` of the batch that these samples are a part of, for losses that need it.
        width: one of the configuration's. Returns the loss and its terms, detached."""
        if width != 1:
            (narrow,) = self._narrow[width]
            return torch.func.functional_call(narrow, self._cut(width), (x, t, labels, target, whole))
        backbone, exits = self.model.backbone, self.model.exits
        with self._autocast(x):
            scores: list[Tensor] = []
            if exits is None:
                prediction, *variances = backbone(x, t, labels).split(x.shape[1], dim=1)
                predictions = [prediction]
            else:
                predictions, scores, variances, _ = all_layers(backbone, exits, x, t, labels)
        predictions = [prediction.float() for prediction in predictions]
        if exits is None:
            loss = F.mse_loss(predictions[0], target)
            logged = {"simple": loss.detach()}
        else:
            known = {} if whole is None else {"whole": BatchMeans(*whole)}
            terms = self._loss(predictions, scores, target, backbone.patchify, *self._weights, **known)
            loss = terms.total
            logged = {name: getattr(terms, name) for name in ("simple", "uem", "ual", "errors", "relative")}
        if self.variance is not None:
            variance = self.variance([v.float() for v in variances], predictions[-1], target, t)
            loss, logged["variance"] = loss + variance.sum(), variance.detach()
        return loss, logged

    @torch.no_grad()
    def means(self, x: Tensor, t: Tensor, labels: Tensor | None, target: Tensor) -> Tensor:
        """Arguments as in `forward`. Returns [2, L], the `batch_means` of these samples."""
        with self._autocast(x):
            predictions, scores, _, _ = all_layers(self.model.backbone, self.model.exits, x, t, labels)
        found = batch_means([prediction.float() for prediction in predictions], scores, target)
        return torch.stack([found.certainty, found.errors])

    def _cut(self, width: float) -> dict[str, Tensor]:
        """Parameters for a narrow objective: views of the model's weights."""
        cut_weights = cut(dict(self.model.backbone.named_parameters()), narrow_shapes(self.model.config, width))
        exits = {} if self.model.exits is None else dict(self.model.exits.named_parameters())
        backbone = {f"model.backbone.{name}": value for name, value in cut_weights.items()}
        return backbone | {f"model.exits.{name}": value for name, value in exits.items()}

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self._half)
