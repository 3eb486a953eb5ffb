"""FreezeBatchNorm: batch norms that neither learn statistics nor normalise with a batch, whoever calls train()."""

from __future__ import annotations

from contextlib import ExitStack

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.both_lightnings import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_bn.choices import Choices, check_choices, is_chosen
from lightning_bn.discovery import BatchNormLayer, ancestors, find_batch_norms, unserved, user_name
from lightning_bn.modes import held_in_eval
from lightning_bn.set_in_use import sets_of
from lightning_bn.torchscript import scriptable


class FreezeBatchNorm(Callback):
    """Keep batch norms in eval mode through a whole fit: they normalise with their running statistics, and these stay
    bit-identical.

    ``requires_grad_(False)`` freezes weights and leaves running statistics moving; ``module.eval()`` is undone by the
    next ``train()``; `BaseFinetuning` with ``train_bn=False`` makes its layers normalise with the batch. Here
    ``train()`` of a module around a layer passes the layer by, and a flag that is set directly is set back before the
    layer runs. Layers are found when the fit starts, so those that ``configure_model`` builds are found too.

    Args:
        modules: which: batch norms, or modules with all batch norms below them. A name, a pattern of names
            (``"backbone.*"``), a class, a function of name and module, or several of these.
        affine: whether their affine weight and bias, of all their sets, are frozen too, by ``requires_grad_(False)``.
        until_epoch: the first epoch, counted from 0, in which the layers train; None: they are given back when the fit
            ends, in the mode that they had before it.

    Raises:
        TypeError: modules that are none of these.
        ValueError: until_epoch below 1.
        MisconfigurationException: at the start of the fit, where no batch norm is meant; or where ``until_epoch=`` is
            to unfreeze affine parameters on several ranks, whose gradients DDP would not average.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import FreezeBatchNorm
        >>> freeze = FreezeBatchNorm("backbone", until_epoch=5)
        >>> trainer = Trainer(callbacks=[freeze], logger=False, enable_checkpointing=False)
    """

    __module__ = "lightning_bn"

    def __init__(self, modules: Choices, *, affine: bool = False, until_epoch: int | None = None) -> None:
        check_choices(f"FreezeBatchNorm({modules!r})", modules)
        if until_epoch is not None and (not isinstance(until_epoch, int) or until_epoch < 1):
            raise ValueError(
                f"FreezeBatchNorm(..., until_epoch={until_epoch!r}): the first epoch in which the layers train, at "
                "least 1, as in until_epoch=5; None keeps them frozen through the fit."
            )
        self.modules = modules
        self.affine = affine
        self.until_epoch = until_epoch
        self._held = ExitStack()
        self._layers: list[_BatchNorm] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before the strategy wraps the model and the optimizers are built: both go by which parameters require grad.
        if stage == "fit" and self.affine:
            self._freeze_affine(self._chosen(pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        chosen = self._chosen(pl_module)
        if not chosen:
            names = [layer.name for layer in find_batch_norms(pl_module)]
            raise MisconfigurationException(
                f"FreezeBatchNorm({self.modules!r}): no batch norm of {type(pl_module).__name__} is meant; it has "
                f"{', '.join(names[:6]) or 'none'}{', ...' * (len(names) > 6)}. Give names or patterns of them, or of "
                f"modules above them.{unserved(pl_module)}"
            )
        if self.affine and self.until_epoch is not None and trainer.world_size > 1:
            raise MisconfigurationException(
                f"FreezeBatchNorm({self.modules!r}, affine=True, until_epoch={self.until_epoch}): on several ranks the "
                "gradients of parameters that are unfrozen during a fit are not averaged. Leave out affine=True, or "
                "until_epoch=."
            )
        if self.affine:
            self._freeze_affine(chosen)
        self._layers = [layer.module for layer in chosen]
        self._held.enter_context(held_in_eval(self._layers))
        self._held.callback(scriptable(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: Lightning has just warned of modules in eval mode, as most are that nobody meant.
        for layer in self._layers:
            layer.training = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.until_epoch is not None and trainer.current_epoch >= self.until_epoch and self._layers:
            self._held.close()
            for layer in self._layers:
                layer.train()
            self._layers = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._held.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held.close()

    def _chosen(self, module: LightningModule) -> list[BatchNormLayer]:
        named = ((user_name(path), part) for path, part in module.named_modules(remove_duplicate=False))
        meant = {name for name, part in named if is_chosen(self.modules, name, part)}
        return [
            layer
            for layer in find_batch_norms(module)
            if any(meant.intersection((name, *ancestors(name))) for name in layer.names)
        ]

    def _freeze_affine(self, layers: list[BatchNormLayer]) -> None:
        for layer in layers:
            sets = sets_of(layer.module)
            holders = [layer.module, *(() if sets is None else sets.waiting(layer.module).values())]
            for parameter in (each for holder in holders for each in holder.parameters(recurse=False)):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._held.callback(parameter.requires_grad_, True)
