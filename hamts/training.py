"""Fitting: consecutive windows of streams side by side, the memory carried on, masked continuation as the task.

The only place that imports lightning.

B streams side by side · C channels · G targets · N context patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from hamts.checks import FitReport, FitState, FitTask, Run, calibrate_thresholds, resume_fit, save_fit
from hamts.config import MachineConfig, ModelConfig, TrainConfig
from hamts.data.constants import chosen, constant, sent
from hamts.data.patches import Chunk, PatchStore
from hamts.nn.compiled import compile_parts
from hamts.nn.head import pinball
from hamts.nn.tokens import Policy
from hamts.ops.kernels import KernelError, Kernels, resolve_kernels
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import stack_memories
from hamts.training_auxiliary import inner_loss, score_loss
from hamts.training_graphs import (
    Passes,
    Restarted,
    Restarts,
    StepGraph,
    StepInputs,
    check_graphs,
    filled_up,
    recorders,
    restarted,
    side_by_side,
)
from hamts.training_parallel import (
    follow_average,
    follow_scores,
    make_strategy,
    own_streams,
    shard,
    total,
    touch_all,
)
from hamts.training_process import keep_freed_memory, quiet_lightning
from hamts.windows import CROSS_CHANCE, StreamWindows, Windows, on_device, scale_history

__all__ = ["FitReport", "fit_device", "fit_network", "planned_kernels"]

# on a GPU a few large chunks beat many small ones, up to so many tokens where logits are written
PREFIX_CHUNK_PATCHES, PREFIX_CHUNK_PATCHES_GPU, PREFIX_TOKENS = 128, 512, 1 << 15
# what a core does of this network's arithmetic in a second, as seen in fits of the preset "small"
CORE_FLOPS, TARGET_SECONDS = 2.1e10, 240.0
FEWEST_STEPS, MOST_STEPS, GPU_STEPS = 150, 1500, 1500
MOST_PASSES = 40


class HAMTrainer(L.LightningModule):
    """Thin: one step reads a context, then forecasts; the memory stays here between steps."""

    def __init__(self, task: FitTask, run: Run, state: FitState) -> None:
        super().__init__()
        self.network, self.config, self.task, self.run, self.state = task.network, task.config, task, run, state
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.sharded = False
        self.graph: StepGraph | None = None
        self.restarts: Restarts | None = None

    def configure_model(self) -> None:
        if self.task.machine.strategy == "fsdp" and not self.sharded:
            shard(self, self.device_mesh["data_parallel"])  # type: ignore[index]
            self.sharded = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = list(self.network.named_parameters())
        decayed = [p for name, p in named if p.dim() >= 2 and not name.endswith("gain")]
        plain = [p for name, p in named if p.dim() < 2 or name.endswith("gain")]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        # fused: one pass over all weights instead of a dozen small operations for each
        fused = not self.sharded and not self.task.machine.precision.startswith("16")
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.98), fused=fused)
        if self.state.optimizer is not None:
            optimizer.load_state_dict(self.state.optimizer)
        return optimizer

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **given: Any) -> None:
        """Lightning clips no gradients of a fused optimiser, for its scaler's sake; where it is fused there is none."""
        if optimizer.defaults["fused"]:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.gradient_clip)
        else:
            self.clip_gradients(optimizer, *args, **given)

    def transfer_batch_to_device(self, batch: Windows, device: torch.device, dataloader_idx: int) -> Windows:
        return on_device(own_streams(batch), device)

    def on_train_batch_start(self, batch: Windows, batch_idx: int) -> None:
        done = self.run.progress(self.state.steps)
        warm = min(1.0, (self.state.steps + 1) / self.config.warmup_steps)
        rate = self.config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: Windows, batch_idx: int) -> torch.Tensor:
        return self(batch)

    def forward(self, batch: Windows) -> torch.Tensor:
        """Loss of a step: read each part of the context, then forecast."""
        inputs = StepInputs(batch.parts, batch.share, batch.cross)
        if self.task.machine.cuda_graphs and (self.graph is None or self.graph.streams != len(batch.share)):
            self.state.carried = self.state.carried if self.graph is None else None  # that of other streams
            drawn, policy = [self.state.explore], self._policy(batch.share, batch.cross)
            self.graph, self.restarts = recorders(self._passes, self._read_prefix, self.network, policy, drawn)
        result = (self.graph or self._passes)(inputs, self._memory(batch))
        self.state.carried = result.memory
        # added up where it is: asking for the number would wait for the device at every step
        self.loss_sum, self.loss_count = self.loss_sum + result.task.detach(), self.loss_count + 1
        return result.loss + touch_all(self.network) if self.sharded else result.loss

    def _passes(self, inputs: StepInputs, memory: StreamMemory) -> Passes:
        """Everything of a step that has a gradient; nothing of it waits for the device, or asks it."""
        network = self.network
        policy = self._policy(inputs.share, inputs.cross)
        ahead_policy = replace(policy, cap_kept=None, cap_must=None, explore_share=0.0)
        readings, origins = [], []
        for context, horizon in inputs.parts:
            past = network(context, memory, policy)
            follow_scores(network, past)
            memory = past.memory
            readings.append((past, context))
            origins.append((memory, horizon))
        traces = [trace for past, _ in readings for trace in past.traces]
        for start, chunk in side_by_side(origins):
            times = len(chunk.values) // len(inputs.share)
            rule = replace(
                ahead_policy, share=policy.share.repeat(times), readable=policy.readable.repeat(times, 1, 1)
            )  # fmt: skip
            ahead = network(chunk, start, rule, advance=False)
            readings.append((ahead, chunk))
            traces += ahead.traces
        losses, counts = zip(*(self._task_loss(reading, chunk) for reading, chunk in readings), strict=True)
        task = torch.stack(losses).sum() / total(torch.stack(counts).sum()).clamp_min(1)  # []
        scored = score_loss(traces, task, self.config.auxiliary_target)  # []
        loss = task + self.config.auxiliary_weight * scored + self.config.inner_weight * inner_loss(traces, task)
        return Passes(loss, task.detach(), memory.detach())

    def mean_loss(self) -> float:
        """Mean task loss since the last call."""
        mean = float(self.loss_sum) / max(self.loss_count, 1)
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        return mean

    def _memory(self, batch: Windows) -> StreamMemory:
        """The carried memory; streams that restart get a fresh one, filled from the patches before their window."""
        rows = torch.nonzero(batch.reset).squeeze(1)  # [b], on the CPU: nothing waits for the device
        carried = self.state.carried
        if carried is not None and self.graph is not None and carried is self.graph.memory:
            self._renew(batch, carried)
            return carried
        if carried is not None and len(rows) == 0:
            if self.sharded:
                # weights are gathered from all processes, so all of them read a prefix or none does
                self._fresh(batch, rows.new_zeros(1))
            return carried
        fresh = self._fresh(batch, rows)
        if carried is None or len(rows) == len(batch.reset):
            return fresh
        taken = torch.arange(len(batch.reset))  # [B]
        taken[rows] = len(taken) + torch.arange(len(rows))
        return stack_memories([carried, fresh]).select(sent(taken, batch.share.device))

    def _renew(self, batch: Windows, carried: StreamMemory) -> None:
        """Give streams that restart their new memory where the old one lies."""
        if not bool(batch.reset.any()):
            return
        assert self.restarts is not None
        rows, taken = filled_up(batch.reset)  # [R], [B]
        self.restarts(carried, restarted(batch, rows, taken), batch.prefix)

    def _fresh(self, batch: Windows, rows: torch.Tensor) -> StreamMemory:
        """Memory of streams that restart, rows [b]."""
        return self._read_prefix(restarted(batch, rows, torch.zeros_like(batch.items)), batch.prefix)

    @torch.no_grad()
    def _read_prefix(self, streams: Restarted, prefix: int) -> StreamMemory:
        """Warm statistics, and everything kept of the patches before the context by the present weights."""
        network, windows = self.network, self.state.windows
        memory = replace(network.empty_memory(len(streams.items)), scale=streams.scale)
        policy = replace(self._policy(streams.share, streams.cross), masses=False)
        network.eval()
        most = PREFIX_CHUNK_PATCHES if windows.device.type == "cpu" else PREFIX_CHUNK_PATCHES_GPU
        if not network.kernels.fused:
            most = min(most, max(128, PREFIX_TOKENS // (len(streams.items) * len(network.spec.roles))))
        for low in range(0, prefix, most):
            chunk = windows.store.window(streams.items, streams.first - prefix + low, min(most, prefix - low))
            memory = network(chunk, memory, policy, decode=False).memory
        network.train()
        return memory

    def _policy(self, share: torch.Tensor, cross: torch.Tensor) -> Policy:
        """Caps as they will be in use, some exploration; thresholds move between steps alone."""
        return replace(
            self.state.windows.within(self.network.policy(share, cross=cross)),
            threshold="fixed",
            explore_share=self.network.memory_config.explore_share,
            explore_generator=self.state.explore,
            masses=self.config.auxiliary_target == "attention",
        )

    def _task_loss(self, reading: Any, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed quantile loss over hidden target steps whose truth is known, and how many there were."""
        targets = self.network.spec.targets
        truth = chosen(chunk.truth, targets)  # [B, G, N, P]
        scaled = (truth - reading.mean[..., None]) / reading.scale[..., None]  # [B, G, N, P]
        assert chunk.horizon is not None
        asked = chunk.horizon[:, None] & ~chosen(chunk.observed, targets) & ~torch.isnan(truth)  # [B, G, N, P]
        scaled = torch.where(asked, scaled.clamp(-30, 30), 0.0).to(reading.quantiles.dtype)  # [B, G, N, P]
        levels = constant(self.network.config.quantiles, scaled.dtype, scaled.device)  # [Q]
        losses = pinball(reading.quantiles, scaled, levels)  # [B, G, N, P]
        return torch.where(asked, losses, 0.0).sum(), asked.sum()


class Checks(Callback):
    """Validates now and then, keeps the best weights, stops when nothing improves or the time is up."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Windows, batch_idx: int
    ) -> None:
        task, run, state = pl_module.task, pl_module.run, pl_module.state
        if (batch_idx + 1) % task.machine.accumulate:
            return
        state.steps += 1
        follow_average(run.averaged, pl_module.network)
        if trainer.world_size > 1:
            run.agreed_seconds = None
            run.agreed_seconds = trainer.strategy.broadcast(run.seconds)
            run.quiet = run.quiet or not trainer.is_global_zero
        done = run.progress(state.steps)
        if done >= run.next_check or done >= 1.0:
            run.next_check = (math.floor(done * task.config.checks + 1e-9) + 1) / task.config.checks
            run.check(state.steps, pl_module.mean_loss())
            if task.folder is not None:
                state.optimizer = trainer.optimizers[0].state_dict()
                save_fit(task, run, state)
        if run.out_of_time():
            run.stopped_by = "max_time"
        trainer.should_stop = run.stopped_by != "max_steps" or state.steps >= task.max_steps

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            pl_module.run.stopped_by = "interrupt"


def step_budget(network: HAMNetwork, store: PatchStore, ends: np.ndarray, config: TrainConfig, *, gpu: bool) -> int:
    """Optimiser steps that fit about ``TARGET_SECONDS`` on this machine's cores, and no more than the data can use.

    Counted, not timed, so that the same machine always takes the same number of steps.
    """
    weights = sum(p.numel() for p in network.parameters())
    tokens = config.batch_windows * len(network.spec.roles) * (config.context_patches + 3 * config.origins)
    cores = torch.get_num_threads()
    affordable = GPU_STEPS if gpu else int(TARGET_SECONDS * CORE_FLOPS * cores / (6 * weights * tokens))
    patches = int(((np.asarray(ends) + store.lead.numpy()) // store.patch_steps).clip(1).sum())
    useful = MOST_PASSES * patches // config.batch_windows
    return int(np.clip(min(affordable, useful), FEWEST_STEPS, MOST_STEPS))


def fit_network(
    network: HAMNetwork,
    store: PatchStore,
    *,
    ends: np.ndarray,
    cutoffs: list[np.ndarray],
    horizon: int,
    config: TrainConfig,
    share: float,
    machine: MachineConfig,
    run_dir: str | None = None,
    progress: bool | None = None,
    verbose: bool = True,
    augment: Callable[[StreamWindows], None] | None = None,
) -> FitReport:
    """Fit in place: the weights best on validation are restored, thresholds calibrated, cross-reading decided.

    Args:
        ends: how many observed steps of each item may be used for training, [I].
        cutoffs: validation cutoffs of each item, in observed steps; may be empty, and then the last weights stay.
        horizon: F, steps to forecast.
        share: budget share at which checks are made.
        machine: on what to fit. With several processes each returns the same model.
        run_dir: folder in which an interrupted fit can be resumed by the same call; None: none is written.
        progress: a bar; None: on a terminal only.
        augment: changes the training rows before each batch, see ``StreamWindows``; validation reads them as they are.

    Raises:
        ValueError: ``run_dir`` holds another fit, or is given to several processes.
        KernelError: a kernel was asked for that cannot run.
    """
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None and machine.devices > 1:
        raise ValueError("run_dir resumes fits of one process. Got devices > 1. Leave run_dir out, or use devices=1.")
    device = fit_device(machine)
    gpu = device.type == "cuda"
    history = scale_history(network, store)
    network.to(device)
    kernels = planned_kernels(network.config, machine)
    network.use_kernels(kernels)
    steps = config.max_steps or step_budget(network, store, ends, config, gpu=gpu)
    # what is compiled or spread over processes is a copy: the network itself stays plain
    plain = machine.compile_mode == "none" and machine.strategy != "fsdp"
    fitted = network if plain else copy.deepcopy(network)
    task = FitTask(fitted, store, cutoffs, horizon, share, config, steps, folder, machine)
    bar = sys.stderr.isatty() if progress is None else progress
    run = Run(task, quiet=bar or not verbose)
    windows = StreamWindows(
        store, history, ends=ends, horizon=horizon, config=config,
        cross_chance=CROSS_CHANCE if task.chooses_reading else 1.0, device=device, same_sizes=machine.cuda_graphs,
        few_prefixes=gpu, augment=augment,
    )  # fmt: skip
    if not gpu:
        keep_freed_memory()
    state = FitState(windows, torch.Generator(device).manual_seed(config.seed + 1))
    fitted.backbone.checkpointing = machine.checkpointing
    compile_parts(fitted, machine.compile_mode)
    module = HAMTrainer(task, run, state)
    fitted.train()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        if task.folder is not None:
            resume_fit(task, run, state)
        if state.steps < steps:
            _run_lightning(module, windows, bar=bar)
    network.cpu()
    network.use_kernels(Kernels("torch", "the model is on the CPU"))
    network.backbone.checkpointing = False
    if not run.history or run.history[-1]["step"] != state.steps:
        run.check(state.steps, module.mean_loss())
    assert run.best is not None
    network.load_state_dict({name: value.cpu() for name, value in run.best.items()})
    network.eval()
    calibrate_thresholds(network, store, ends, share=share)
    return FitReport(
        state.steps, run.seconds, run.best_step, run.best_score, tuple(run.history), run.stopped_by,
        kernel=kernels.name, kernel_why=kernels.why, device=torch.cuda.get_device_name(device) if gpu else "cpu",
    )  # fmt: skip


def fit_device(machine: MachineConfig) -> torch.device:
    """Where this process fits; lightning's own ``auto`` would also take what kernels here know nothing of."""
    gpu = machine.accelerator in ("gpu", "cuda") or (machine.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")


def planned_kernels(model: ModelConfig, machine: MachineConfig) -> Kernels:
    """What will run the layers of a fit. Raises KernelError where that cannot run."""
    if model.mixer != "ham":
        if machine.kernel not in ("auto", "torch"):
            raise KernelError(f"kernel={machine.kernel!r} runs layers of mixer='ham' only. Got {model.mixer!r}.")
        return Kernels("torch", f"mixer={model.mixer!r} has no other")
    dtype = torch.float64 if machine.precision.startswith("64") else torch.float32
    device = fit_device(machine)
    kernels = resolve_kernels(machine.kernel, device=device, head_width=model.width // model.heads, dtype=dtype)
    check_graphs(machine, kernels, device)
    return kernels


def _run_lightning(module: HAMTrainer, windows: StreamWindows, *, bar: bool) -> None:
    """The loop itself. Nothing is written outside a temporary folder."""
    machine = module.task.machine
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), quiet_lightning():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=1, min_epochs=0, accelerator=fit_device(machine).type, devices=machine.devices,
            strategy=make_strategy(machine.strategy, machine.devices), accumulate_grad_batches=machine.accumulate,
            precision=machine.precision, use_distributed_sampler=False,  # type: ignore[arg-type]
            logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=bar,
            callbacks=[Checks()], default_root_dir=scratch, gradient_clip_val=module.config.gradient_clip,
        )  # fmt: skip
        try:
            trainer.fit(module, DataLoader(windows, batch_size=None, num_workers=0))
        except SystemExit:
            # lightning turns Ctrl-C into an exit; what was fitted so far is usable
            if module.run.stopped_by != "interrupt":
                raise
