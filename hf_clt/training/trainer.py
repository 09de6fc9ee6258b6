"""The training loop: text in, a released cross-layer transcoder out."""

import logging
import os
import secrets
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from huggingface_hub import CommitInfo
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..configuration_clt import CLTConfig
from ..device import Stopwatch, rounded_products, to_device
from ..evaluation.metrics import MetricSums
from ..files import local_or_hub
from ..harvest.buffer import ActivationBuffer
from ..harvest.harvester import Harvester, check_fit
from ..hub.background import BackgroundPush
from ..hub.push import check_push_access, push_folder
from ..modeling_clt import THRESHOLD_DECAY, CLTOutput, CrossLayerTranscoder
from ..sharding import gather_tokens, sum_over
from . import publishing
from .arguments import CLTTrainingArguments
from .checkpoints import CheckpointError, find_checkpoint, read_state
from .evaluation import evaluate_heldout, gather_sums
from .optimizers import clip_grad_norm, make_optimizer
from .output_folder import check_output_dir, prepare_output_dir
from .preparation import initialize_from_data, open_activations
from .processes import AgreedBatches, StopSignals, any_process, together, wait_for_all
from .reporting import last_evaluated_step, progress_figures, warn_if_dense, warn_if_wide, write_row
from .run_state import checkpoint_on_failure, moving_state, restore_run, save_run
from .schedules import (
    annealed_k,
    growing_reach,
    initial_steering,
    last_restart,
    learning_rate_scale,
    restarts_threshold,
    sparsity_scale,
    steer_sparsity,
)
from .setup import (
    check_initial_k,
    check_reach_growth,
    check_shard,
    check_target_l0,
    fill_defaults,
    keep_device_choices,
    make_accelerator,
    make_layout,
    num_decay_steps,
    prepare_device,
)
from .trackers import check_trackers, finish_trackers, start_trackers
from .writer import CheckpointWriter


logger = logging.getLogger(__name__)

LOSSES = ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")


@torch.no_grad()
def limit_reach(clt: CrossLayerTranscoder, reach: int) -> None:
    """Sets to 0 what decoders would write to further target layers than the first `reach` of each source layer."""
    for decoder in clt.decoders:
        decoder.weight[:, reach:] = 0


class CLTTrainer:
    """
    Trains a cross-layer transcoder on a language model.

    Everything that can be wrong with the arguments is found in the constructor, before any long work.

    Args:
        args ([`CLTTrainingArguments`]): The run.
        config ([`CLTConfig`], *optional*): Shape and losses of a new CLT.
        model ([`CrossLayerTranscoder`], *optional*): A CLT to go on training, instead of `config`. Statistics are put
            into it so that the function it computes does not change at first.
        harvester ([`Harvester`], *optional*): Runs the language model, with `tokenizer`; otherwise `args.model` is
            loaded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer of the harvester's model.

    Raises:
        ValueError: For arguments that do not fit each other, the language model, the text or the output folder.
    """

    def __init__(
        self,
        args: CLTTrainingArguments,
        config: CLTConfig | None = None,
        model: CrossLayerTranscoder | None = None,
        *,
        harvester: Harvester | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if (harvester is None) != (tokenizer is None):
            raise ValueError("harvester and tokenizer belong together; give both, or neither to have model loaded")
        if (config is None) == (model is None):
            raise ValueError("CLTTrainer needs either config (a new CLT) or model (one to go on training), not both")
        if model is not None and model.lazy:
            raise ValueError("model was loaded with lazy=True, for analysis; load it without lazy to train it")
        if args.dataset is None:
            raise ValueError("dataset=None: give a Hub name or a local .txt, .jsonl or .parquet file")
        self.config = model.config if config is None else config
        self.output_dir = Path(args.output_dir)
        check_shard(self.config, args.feature_parallel_size, model)
        check_trackers(args)
        check_initial_k(self.config, args.initial_k)
        check_target_l0(self.config, args.target_l0)
        check_reach_growth(self.config, args.reach_growth, is_new=model is None)
        self.resume_from = None
        if args.resume_from_checkpoint is not None:
            self.resume_from = find_checkpoint(args.resume_from_checkpoint, self.output_dir)
            args = keep_device_choices(args, read_state(self.resume_from))
        self.accelerator = make_accelerator(args)
        self.args = args = fill_defaults(args, self.config, self.accelerator.device)
        self.progress = self.accelerator.is_local_main_process and not args.disable_progress_bar
        self.layout = make_layout(self.accelerator, args.feature_parallel_size)
        self.shard = self.layout.shard
        prepare_device(args, self.accelerator, self.progress)
        # Going on from another run's checkpoint is not going on with the run in output_dir.
        self.goes_on = self.resume_from is not None and self.resume_from.resolve().parent == self.output_dir.resolve()
        check_output_dir(self.output_dir, args.overwrite_output_dir, goes_on=self.goes_on)
        hub = {"private": args.hub_private or None, "revision": args.hub_branch}
        if args.push_to_hub and self.accelerator.is_main_process:
            check_push_access(args.hub_model_id, **hub)
        self.background_push = BackgroundPush(args.hub_model_id, **hub) if args.hub_push_interval else None

        name = args.model or self.config.base_model_name_or_path
        self.harvester, self.tokens, self.heldout = open_activations(
            args, self.config, name, self.accelerator, harvester, tokenizer
        )
        check_fit(self.config, self.harvester, name)
        if args.eval_replacement and self.config.activation_fn == "topk" and self.config.k_scope == "token":
            raise ValueError(
                "eval_replacement=True cannot be met: features of a topk CLT with k_scope='token' depend on later "
                "layers; leave it out, or train with k_scope='layer'"
            )
        self.config.base_model_name_or_path = self.config.base_model_name_or_path or name
        if self.config.base_model_name_or_path is not None:
            self.config.base_model_name_or_path = local_or_hub(self.config.base_model_name_or_path)
        self.config.base_model_revision = self.config.base_model_revision or args.model_revision

        set_seed(args.seed)
        with self.accelerator.device:  # made there: a host has not the memory for the CLT of each of its GPUs
            self.model = CrossLayerTranscoder(self.config, self.shard) if model is None else model
        self.model.shard = self.shard
        self.is_new = model is None
        self.model.cast_decoders(getattr(torch, args.clt_dtype or "float32"))
        self.model.to(self.accelerator.device)
        self.skip_bad = args.on_bad_activations == "skip"
        self.buffer = ActivationBuffer(
            self.tokens,
            self.harvester,
            n_batches=args.n_batches_in_buffer,
            batch_size=args.batch_size,
            passes=args.buffer_passes,
            dtype=getattr(torch, args.buffer_dtype) if args.buffer_dtype else self.harvester.dtype,
            device=args.buffer_device or self.accelerator.device,
            seed=args.seed + self.accelerator.process_index,
            progress=self.progress,
            overlap=args.overlap_harvest,
            skip_bad=self.skip_bad,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.num_decay_steps = num_decay_steps(args, self.config)
        self.signals = StopSignals()
        self.fingerprint = self.harvester.fingerprint()
        self.step = 0
        self.tokens_seen = 0
        self.run_id = secrets.token_hex(4)  # of trackers
        # Since the last line of metrics.jsonl: sums of the losses, tokens of this process, updates.
        self.totals = torch.zeros(len(LOSSES), device=self.accelerator.device)
        self.tokens_since_log = self.updates_since_log = 0
        self.steps_since_fired = torch.zeros(
            self.config.num_layers, self.model.num_held, dtype=torch.int64, device=self.accelerator.device
        )
        self.steering = initial_steering().to(self.accelerator.device)
        self.revives = False  # whether there are dead features to revive
        # In the language model (harvester), in the CLT, and wall time in all; of earlier parts of a resumed run too. A
        # log line takes the events of a GPU, which is then waited for anyway.
        self.seconds = {"language_model": 0.0, "clt": 0.0, "total": 0.0}
        self.clt_stopwatch = Stopwatch(self.accelerator.device)
        self._clock = self._log_clock = time.perf_counter()
        self.last_evaluation: tuple[int, dict] | None = None  # step, metrics
        self.last_written: int | None = None  # step of the last evaluation in metrics.jsonl
        self.lock: int | None = None  # on output_dir, in the main process
        self.saved_step: int | None = None  # of the newest checkpoint in output_dir, or of the one being written
        self.writer = CheckpointWriter(self.accelerator.device.type == "cuda" and self.accelerator.num_processes == 1)

    def train(self) -> CrossLayerTranscoder:
        """
        Trains, evaluates, and writes the released CLT, its card and `metrics.jsonl` to `output_dir`.

        Returns:
            The trained [`CrossLayerTranscoder`], in eval mode, its statistics still inside.

        Raises:
            KeyboardInterrupt: After Ctrl-C or SIGTERM, once a checkpoint is written.
            [`StreamError`], [`ActivationError`], ...: If text or language model fail, once a checkpoint is written.
            [`OtherProcessFailed`]: If they fail in another process, likewise.
            ValueError: If another run writes to `output_dir`.
            [`OtherProcessGone`]: If another process was killed; the checkpoints that there are stay.
            [`CheckpointError`]: If a checkpoint cannot be written.
            FloatingPointError: If the loss is not finite.
        """
        try:
            clt = self._train()
            self.writer.wait()
            return clt
        except KeyboardInterrupt:
            self.writer.given_up = True  # the first Ctrl-C has waited for it, the second does not
            raise
        except Exception as error:
            try:
                self.writer.wait()
            except CheckpointError as failure:
                error.add_note(str(failure))
            raise
        finally:
            self.tokens.close()
            finish_trackers(self.accelerator)
            if self.lock is not None:
                os.close(self.lock)
                self.lock = None

    def _train(self) -> CrossLayerTranscoder:
        args, accelerator = self.args, self.accelerator
        self._clock = time.perf_counter()
        if self.resume_from is None:
            initialize_from_data(self)
            optimizer = make_optimizer(self.model, args)
        else:
            optimizer = restore_run(self)
        together(accelerator, partial(prepare_output_dir, self))
        self.last_written = last_evaluated_step(self.output_dir)
        model, optimizer = self._distribute(optimizer)
        start_trackers(accelerator, args, self.config, self.run_id, self.step, self.goes_on)
        # An evaluation that failed after its update was checkpointed is made up for.
        if self.goes_on and is_due(self.step, args.eval_interval):
            self._evaluate_and_write(optimizer)
        model.train()

        self.batches = AgreedBatches(accelerator, self.buffer, args.gradient_accumulation_steps)
        self._log_clock = time.perf_counter()
        warned = False
        bar = tqdm(
            total=args.training_steps, initial=self.step, desc="Training", unit="step", disable=not self.progress
        )
        with self.signals.caught(self._is_reading, announce=accelerator.is_main_process):
            with bar:
                while self.step < args.training_steps:
                    self.writer.check()
                    batch, output, scale = self._update(model, optimizer)
                    is_last = self.step == args.training_steps
                    if self.step % args.log_interval == 0 or is_last or self.step == 1:
                        row = self._log_row(batch, output, optimizer.param_groups[0]["lr"], scale)
                        write_row(self, row)
                        bar.set_postfix(progress_figures(row))
                        if self.step == 1:
                            warn_if_wide(output.features, self.config)
                        if not warned and args.target_l0 is None and self.step >= args.training_steps / 4:
                            warned = warn_if_dense(row, self.config)
                    bar.update()
                    if not is_last and is_due(self.step, args.eval_interval):
                        self._evaluate_and_write(optimizer)
                    if not is_last and is_due(self.step, args.checkpoint_interval):
                        save_run(self, optimizer)
                    if not is_last and is_due(self.step, args.hub_push_interval):
                        publishing.push_in_background(self)
            self._evaluate_and_write(optimizer)
            self.model.eval()
            # The first two are accelerate's, which round to half precision.
            for name in ("forward", "_original_forward", "threshold_decay"):
                vars(self.model).pop(name, None)
            # Where processes share the features they exchange weights in a release, and cannot fail together.
            with checkpoint_on_failure(self, optimizer, alone=self.shard is not None):
                together(accelerator, self._release) if self.shard is None else self._release()
        if self.buffer.skipped_tokens:
            logger.warning("%d tokens were skipped: their activations were not finite", self.buffer.skipped_tokens)
        wait_for_all(accelerator)
        finish_trackers(accelerator)
        if args.push_to_hub:  # last, so that no process waits for the upload of another until it times out
            publishing.push_finished(self)
        return self.model

    def _distribute(self, optimizer) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """
        The model and the optimizer for [`_update`]: with mixed precision, and gradients averaged over the processes
        that hold the same features, which get the weights of the first.
        """
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # no DistributedDataParallel yet
        if self.layout.replicas is not None:
            model = DistributedDataParallel(
                model,
                process_group=self.layout.replicas,
                gradient_as_bucket_view=True,  # otherwise it keeps a copy of all gradients
            )
        return model, self.accelerator.prepare_optimizer(optimizer)

    def _update(self, model, optimizer) -> tuple[dict, CLTOutput, float | torch.Tensor]:
        """One optimizer update, on `gradient_accumulation_steps` batches; the last batch, its output, λ's scale."""
        args, accelerator = self.args, self.accelerator
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(
                self.step, args.training_steps, args.num_warmup_steps, args.lr_scheduler, self.num_decay_steps
            )
        if args.initial_k is not None:
            self.model.training_k = annealed_k(self.step, self.config.k, args.initial_k, args.num_k_anneal_steps)
        if self.config.activation_fn == "batchtopk" and restarts_threshold(self.step, args.training_steps):
            self.model.restart_running_thresholds()
        if args.target_l0 is None:
            scale = sparsity_scale(self.step, args.training_steps, args.sparsity_schedule, args.sparsity_delay_steps)
        else:
            scale = self.steering[0].exp().float()
        # Whether any feature is dead is asked now and then, since a GPU has to be waited for.
        if self.step % max(1, args.dead_feature_window // 100) == 0:
            dead = self._dead()
            self.revives = dead is not None and any_process(accelerator, bool(dead.any()))
        dead = self._dead() if self.revives else None
        fired = torch.zeros_like(self.steps_since_fired)
        tokens_before = self.tokens_since_log
        # If reading fails within this update, here or in another process, the checkpoint has the state before it.
        before = moving_state(self) if self.batches.may_fail_within_update() else None
        # Until its memory is filled, the threshold is the mean over the batches since it was started anew.
        batches_since = self.step - last_restart(self.step, args.training_steps)
        batches_since *= args.gradient_accumulation_steps
        for micro_step in range(args.gradient_accumulation_steps):
            self.model.threshold_decay = min(THRESHOLD_DECAY, 1 - 1 / (batches_since + micro_step + 1))
            all_ready = self.batches.num_agreed > 0
            with checkpoint_on_failure(self, optimizer, before):
                batch = self.batches.read(micro_step, self.signals)
            batch = {name: to_device(rows, accelerator.device) for name, rows in batch.items()}
            self.tokens_since_log += len(batch["inputs"])
            batch = gather_tokens(self.shard, batch, equally_many=all_ready)
            is_last = micro_step == args.gradient_accumulation_steps - 1
            with self.clt_stopwatch.running(), rounded_products(accelerator.device, args.mixed_precision != "no"):
                with nullcontext() if is_last else accelerator.no_sync(model):
                    output = model(**batch, sparsity_scale=scale, dead=dead)
                    accelerator.backward(output.loss / args.gradient_accumulation_steps)
                fired += output.features.active_counts()
                losses = torch.stack([getattr(output, name).detach().float() for name in LOSSES])
                self.totals += losses / args.gradient_accumulation_steps
        with self.clt_stopwatch.running():
            if args.max_grad_norm > 0:
                accelerator.unscale_gradients()  # of float16
                clip_grad_norm(self.model, optimizer.optimizer, args.max_grad_norm)
            if args.target_l0 is not None:
                num_tokens = self.tokens_since_log - tokens_before
                counts = torch.stack([fired.sum(), torch.full_like(fired[0, 0], num_tokens * self.config.num_layers)])
                active, tokens = accelerator.reduce(counts, "sum")
                self.steering = steer_sparsity(
                    self.steering, active / tokens, self.step, args.training_steps, args.target_l0
                )
            if self.layout.replicas is not None:
                dist.all_reduce(fired, group=self.layout.replicas)
            optimizer.step()
            optimizer.zero_grad()
            reach = growing_reach(self.step + 1, args.training_steps, args.reach_growth, self.config.reach)
            if reach < self.config.reach:
                limit_reach(self.model, reach)
            self.steps_since_fired = torch.where(fired > 0, 0, self.steps_since_fired + 1)
        self.step += 1
        self.updates_since_log += 1
        return batch, output, scale

    def _dead(self) -> torch.Tensor | None:
        """
        Features of this process that did not fire for a whole window, (L, F) bool; None before the first window is
        over.
        """
        if self.step < self.args.dead_feature_window:
            return None
        return self.steps_since_fired >= self.args.dead_feature_window

    def _is_reading(self) -> bool:
        """Whether text is waited for, which can take minutes."""
        return any(text is not None and text.is_reading for text in (self.buffer.tokens, self.heldout))

    @torch.no_grad()
    def _log_row(self, batch: dict, output: CLTOutput, learning_rate: float, scale: float | torch.Tensor) -> dict:
        """The line of `metrics.jsonl` for this step: means since the last line; NMSE and L0 of the last batch."""
        accelerator = self.accelerator
        losses = accelerator.reduce(self.totals / self.updates_since_log, "mean").tolist()
        if not all(map(torch.isfinite, torch.tensor(losses))):
            wider = "" if self.model.dtype == torch.float32 else ", or use clt_dtype='float32'"
            raise FloatingPointError(
                f"the loss is not finite at step {self.step} ({dict(zip(LOSSES, losses, strict=True))}); lower "
                f"learning_rate={self.args.learning_rate:g}{wider}"
            )
        sums = MetricSums(self.config.num_layers, self.config.d_model, self.model.num_held, accelerator.device)
        sums.update(batch["labels"], output.reconstruction.detach(), output.features)
        metrics = gather_sums(self, sums).compute()
        dead = self._dead()
        if dead is not None:
            dead = sum_over(self.shard, dead.sum(dim=1)).float() / self.config.num_features
        tokens = int(accelerator.reduce(torch.tensor(self.tokens_since_log, device=accelerator.device), "sum"))
        self.tokens_seen += tokens
        self.read_clocks()
        seconds, self._log_clock = self._clock - self._log_clock, self._clock
        self.totals.zero_()
        self.tokens_since_log = self.updates_since_log = 0
        row = {"step": self.step, "split": "train", **dict(zip(LOSSES, losses, strict=True))}
        for name in ("nmse", "explained_variance", "l0"):
            row[name] = metrics[name]
            row[f"{name}_per_layer"] = metrics[f"{name}_per_layer"]
        if "layers_without_nmse" in metrics:
            row["layers_without_nmse"] = metrics["layers_without_nmse"]
        row["dead_fraction"] = None if dead is None else dead.mean().item()
        row["dead_fraction_per_layer"] = None if dead is None else dead.tolist()
        row["learning_rate"] = learning_rate
        row["sparsity_scale"] = float(scale)
        row["epoch"] = self.buffer.epoch
        row["tokens"] = self.tokens_seen
        if self.skip_bad:
            skipped = torch.tensor(self.buffer.skipped_tokens, device=accelerator.device)
            row["skipped_tokens"] = int(accelerator.reduce(skipped, "sum"))
        row["tokens_per_second"] = tokens / seconds
        return row

    def evaluate(self) -> dict:
        """
        The metrics of the CLT on the held-out text, in raw space, over all processes; where it is released, of what is
        in its files, statistics folded into the weights.

        Returns:
            `dict`: `nmse`, `explained_variance`, `l0`, `dead_fraction`, each also `<name>_per_layer`, `num_tokens` and
            `feature_density`; after the last update with `eval_replacement` also those of [`replacement_metrics`].

        Raises:
            ValueError: If `eval_tokens` is 0.
        """
        if self.heldout is None:
            raise ValueError("eval_tokens=0: there is no held-out text; give eval_tokens, for example 8192")
        if self.last_evaluation is None or self.last_evaluation[0] != self.step:
            args = self.args
            is_last = self.step == args.training_steps
            # What is released now is measured as its files have it; else the live CLT, the same but for rounding.
            folds = is_last or is_due(self.step, args.hub_push_interval)
            metrics = evaluate_heldout(self, folds, with_replacement=is_last and args.eval_replacement)
            self.last_evaluation = (self.step, metrics)
        return self.last_evaluation[1]

    def _evaluate_and_write(self, optimizer) -> None:
        """Evaluates, if there is held-out text and unless that was done before this run went on."""
        done = self.step == self.last_written
        if self.heldout is None or (done and self.step < self.args.training_steps):
            return
        with checkpoint_on_failure(self, optimizer):
            metrics = self.evaluate()  # after the last update for the card too
        if not done:
            write_row(self, {"step": self.step, "split": "heldout", **metrics})
            self.last_written = self.step
        self.model.train()
        self._log_clock = time.perf_counter()

    def _release(self) -> None:
        publishing.write_release(self, self.output_dir)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> "CommitInfo | None":
        """
        Pushes the finished CLT in `output_dir`, which [`train`] wrote, and its measured card; all processes may call
        this, and the first pushes.

        Args:
            repo_id (`str`, *optional*): Defaults to `args.hub_model_id`.
            kwargs: Passed to [`hf_clt.hub.push.push_folder`]; `private` and `revision` default to `args.hub_private`
                and `args.hub_branch`.

        Returns:
            [`~huggingface_hub.CommitInfo`] on the first process, None on the others.

        Raises:
            ValueError: If no repository is named, if there is no finished CLT, and as [`push_folder`].
            ConnectionError: If the connection was cut, and some more attempts failed.
        """
        args = self.args
        repo_id = repo_id or args.hub_model_id
        if repo_id is None:
            raise ValueError("hub_model_id=None: give the repository to push to, such as 'user/clt-gpt2'")
        if not self.accelerator.is_main_process:
            return None
        kwargs = {"private": args.hub_private or None, "revision": args.hub_branch, **kwargs}
        return push_folder(self.output_dir, repo_id, **kwargs)

    def read_clocks(self) -> None:
        """Brings `seconds` up to now."""
        now = time.perf_counter()
        self.seconds["total"] += now - self._clock
        self.seconds["language_model"] += self.harvester.stopwatch.take()
        self.seconds["clt"] += self.clt_stopwatch.take()
        self._clock = now

    def time_shares(self) -> dict[str, float]:
        """
        Share of the wall time of `train` spent in the language model, in the CLT, and elsewhere; the first two overlap
        on a GPU with `overlap_harvest`.
        """
        self.read_clocks()
        total = max(self.seconds["total"], 1e-9)
        shares = {name: self.seconds[name] / total for name in ("language_model", "clt")}
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


__all__ = ["CLTTrainer"]
