"""The training loop: text in, a released cross-layer transcoder out."""

import logging
import os
import secrets
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..configuration_clt import CLT_CONFIG_HELP, TOPK_FAMILY, CLTConfig
from ..device import Stopwatch, rounded_products
from ..evaluation.evaluate import activations
from ..evaluation.metrics import MetricSums
from ..evaluation.replacement import replacement_metrics
from ..files import as_json, local_or_hub
from ..harvest.buffer import ActivationBuffer
from ..harvest.cache import ActivationCache, CachedTokens
from ..harvest.harvester import Harvester, check_context_size, check_fit, load_language_model
from ..harvest.normalization import (
    estimate_statistics,
    load_statistics,
    set_firing_rate,
    set_output_bias,
    warn_if_lost,
)
from ..harvest.statistics import gather
from ..harvest.tokens import open_text
from ..hub.background import BackgroundPush
from ..hub.card import save_model_card
from ..hub.push import check_push_access, push_folder
from ..hub.report import read_history
from ..kernels.encode import multiplies_bfloat16
from ..modeling_clt import THRESHOLD_DECAY, CLTOutput, CrossLayerTranscoder
from ..sharding import gather_tokens, sum_over
from ..sparsity import SparseFeatures
from .arguments import FIXED, CLTTrainingArguments
from .checkpoints import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    newest_usable,
    optimizer_tensors,
    read_state,
    remove_checkpoints_after,
    remove_leftovers,
    save_checkpoint,
)
from .processes import OtherProcessGone, StopRequested, any_process, least, together, wait_for_all
from .reporting import (
    command_line,
    hardware,
    last_evaluated_step,
    non_default_config,
    progress_figures,
    truncate_metrics,
    versions,
)
from .schedules import annealed_k, last_restart, learning_rate_scale, restarts_threshold, sparsity_scale
from .setup import (
    as_before,
    check_initial_k,
    check_output_dir,
    check_shard,
    lock_folder,
    make_accelerator,
    make_layout,
    make_optimizer,
    prepare_cpu,
    remove_run,
    settled,
)
from .trackers import check_trackers, finish_trackers, log_row, start_trackers


logger = logging.getLogger(__name__)

LOSSES = ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")
MEANWHILE = ".pushing.tmp"  # folder in output_dir with what is pushed while training goes on
WIDE_WINDOW = 0.2  # share of features whose computation costs as much as that of all
ASK_SECONDS = 2.0  # between two times that processes ask each other whether one has failed or was told to stop
RATE_SAMPLE = 8192  # tokens on which the initial firing rate is set


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
        tokenizer=None,
    ):
        if (harvester is None) != (tokenizer is None):
            raise ValueError("harvester and tokenizer belong together; give both, or neither to have model loaded")
        if (config is None) == (model is None):
            raise ValueError("CLTTrainer needs either config (a new CLT) or model (one to go on training), not both")
        if model is not None and model.lazy:
            raise ValueError("model was loaded with lazy=True, for analysis; load it without lazy to train it")
        self.config = model.config if config is None else config
        self.output_dir = Path(args.output_dir)
        check_shard(self.config, args.feature_parallel_size, model)
        check_trackers(args)
        self.resume_from = None
        if args.resume_from_checkpoint is not None:
            self.resume_from = find_checkpoint(args.resume_from_checkpoint, self.output_dir)
            args = as_before(args, read_state(self.resume_from))
        self.accelerator = make_accelerator(args)
        self.args = args = settled(args, self.config, self.accelerator.device)
        self.layout = make_layout(self.accelerator, args.feature_parallel_size)
        self.shard = self.layout.shard
        if self.accelerator.device.type == "cpu":
            prepare_cpu()
            if args.mixed_precision != "no" and not multiplies_bfloat16() and self.accelerator.is_main_process:
                logger.warning(
                    "mixed_precision=%r: this CPU has no instructions for half precision and would take several times "
                    "as long, so the matrix products stay float32",
                    args.mixed_precision,
                )
        elif self._progress:
            tqdm.write(
                f"on a GPU: mixed_precision={args.mixed_precision} for products (and TF32, unless it is no), "
                f"model_dtype={args.model_dtype}, store_batch_size_prompts={args.store_batch_size_prompts}, "
                f"n_batches_in_buffer={args.n_batches_in_buffer}"
            )
        # Going on from another run's checkpoint is not going on with the run in output_dir.
        self._goes_on = self.resume_from is not None and self.resume_from.resolve().parent == self.output_dir.resolve()
        check_output_dir(self.output_dir, args.overwrite_output_dir, goes_on=self._goes_on)
        hub = {"private": args.hub_private or None, "revision": args.hub_branch}
        if args.push_to_hub and self.accelerator.is_main_process:
            check_push_access(args.hub_model_id, **hub)
        self.background_push = BackgroundPush(args.hub_model_id, **hub) if args.hub_push_interval else None
        check_initial_k(self.config, args.initial_k)
        if args.dataset is None:
            raise ValueError("dataset=None: give a Hub name or a local .txt, .jsonl or .parquet file")

        name = args.model or self.config.base_model_name_or_path
        self.harvester, self.tokens, self.heldout = self._open_activations(name, harvester, tokenizer)
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
        self.buffer = ActivationBuffer(
            self.tokens,
            self.harvester,
            n_batches=args.n_batches_in_buffer,
            batch_size=args.batch_size,
            dtype=getattr(torch, args.buffer_dtype) if args.buffer_dtype else self.harvester.dtype,
            device=args.buffer_device or self.accelerator.device,
            seed=args.seed + self.accelerator.process_index,
            progress=self._progress,
            overlap=args.overlap_harvest,
            skip_bad=self._skip_bad,
        )
        self._fingerprint = self.harvester.fingerprint()
        self.step = 0
        self.tokens_seen = 0
        self._run_id = secrets.token_hex(4)  # of trackers
        # Since the last line of metrics.jsonl: sums of the losses, tokens of this process, updates.
        self._totals = torch.zeros(len(LOSSES), device=self.accelerator.device)
        self._tokens_since_log = self._updates_since_log = 0
        self.steps_since_fired = torch.zeros(
            self.config.num_layers, self.model.num_held, dtype=torch.int64, device=self.accelerator.device
        )
        # In the language model (harvester), in the CLT, and wall time in all; of earlier parts of a resumed run too. A
        # log line takes the events of a GPU, which is then waited for anyway.
        self.seconds = {"language_model": 0.0, "clt": 0.0, "total": 0.0}
        self._stopwatch = Stopwatch(self.accelerator.device)
        self._clock = time.perf_counter()
        self.last_evaluation: tuple[int, dict] | None = None  # step, metrics
        self._last_written: int | None = None  # step of the last evaluation in metrics.jsonl
        self._interrupted = False
        # Batches that all processes have ready, of those agreed on at the last time they asked each other.
        self._num_agreed = self._num_before = 0
        self._asked_at = self._clock
        self._revives = False  # whether there are dead features to revive
        self._lock: int | None = None  # on output_dir, in the main process
        self._saved_step: int | None = None  # of the newest checkpoint in output_dir

    # -- preparation --------------------------------------------------------------------------------------------------

    @property
    def _progress(self) -> bool:
        return self.accelerator.is_local_main_process and not self.args.disable_progress_bar

    @property
    def _skip_bad(self) -> bool:
        return self.args.on_bad_activations == "skip"

    def _open_activations(self, name: str | None, harvester: Harvester | None, tokenizer):
        """What gives activations, and the extraction batches to train and (or None) to evaluate on."""
        args = self.args
        share = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        if args.activation_cache is not None:
            cache = ActivationCache(args.activation_cache)
            tokens = CachedTokens(cache, "train", **share, seed=args.seed if args.cache_shuffle else None)
            return cache, tokens, CachedTokens(cache, "heldout", **share) if args.eval_tokens else None
        if harvester is None:
            if name is None:
                raise ValueError("model=None: give the Hub name or folder of the language model to train on")
            language_model, tokenizer = load_language_model(
                name,
                revision=args.model_revision,
                dtype=args.model_dtype,
                trust_remote_code=args.trust_remote_code,
                device=self.accelerator.device,
            )
            harvester = Harvester(language_model, self.config.feature_input_hook, self.config.feature_output_hook)
        check_context_size(harvester.model.config, args.context_size)
        heldout = open_text(args, tokenizer, heldout=True, **share) if args.eval_tokens else None
        return harvester, open_text(args, tokenizer, **share), heldout

    def _prepare_model(self) -> None:
        """Statistics, and the initial values that come from data."""
        args = self.args
        if args.normalization_method == "none":
            statistics = None
        elif args.normalization_file is not None:
            statistics = load_statistics(args.normalization_file)
        else:
            batches = (
                args.normalization_estimation_batches if args.normalization_method == "estimated_mean_std" else None
            )
            statistics = estimate_statistics(
                self.tokens,
                self.harvester,
                batches,
                self.accelerator,
                self._progress,
                self._skip_bad,
                partial(together, self.accelerator),
            )
        if statistics is not None:
            self.model.set_normalization(**statistics, reparametrize=not self.is_new)
            if self.buffer.dtype != self.harvester.dtype and self.accelerator.is_main_process:
                for side in ("in", "out"):
                    warn_if_lost(
                        statistics[f"mean_{side}"], statistics[f"std_{side}"], self.buffer.dtype, "--buffer-dtype"
                    )
        if not self.is_new:
            return
        together(self.accelerator, self.buffer.fill)
        size = 1 if self.shard is None else self.shard.size
        first = slice(0, min(RATE_SAMPLE // size, self.buffer.num_unread))  # the slots fill from the first on
        sample = {"inputs": self.buffer.inputs[first], "labels": self.buffer.labels[first]}
        sample = gather_tokens(self.shard, {n: rows.to(self.accelerator.device) for n, rows in sample.items()})
        if statistics is None:
            set_output_bias(self.model, sample["labels"])
        rate = args.initial_feature_rate
        if rate is None:
            is_topk = self.config.activation_fn in ("topk", "batchtopk")
            rate = 0.0 if is_topk else min(0.02, 64 / self.config.num_features)
        if rate > 0:
            set_firing_rate(self.model, sample["inputs"], rate)

    # -- training -----------------------------------------------------------------------------------------------------

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
            return self._train()
        finally:
            finish_trackers(self.accelerator)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _train(self) -> CrossLayerTranscoder:
        args, accelerator = self.args, self.accelerator
        self._clock = time.perf_counter()
        optimizer = self._resume() if self.resume_from is not None else self._begin()
        together(accelerator, self._prepare_output_dir)
        self._last_written = last_evaluated_step(self.output_dir / "metrics.jsonl")
        if self.shard is None:
            model, optimizer = accelerator.prepare(self.model, optimizer)
        else:
            model = accelerator.prepare_model(self.model, evaluation_mode=True)  # no DistributedDataParallel
            optimizer = accelerator.prepare_optimizer(optimizer)
            self._copy_from_first_replica([*self.model.parameters(), *self.model.buffers()])
        start_trackers(accelerator, args, self.config, self._run_id, self.step, self._goes_on)
        model.train()
        # An evaluation that failed after its update was checkpointed is made up for.
        if self._goes_on and is_due(self.step, args.eval_interval) and self.heldout is not None:
            self._evaluate_and_write(optimizer)
            model.train()

        batches = self.buffer.endless()
        self._log_clock = time.perf_counter()
        warned = False
        bar = tqdm(
            total=args.training_steps, initial=self.step, desc="Training", unit="step", disable=not self._progress
        )
        with self._catching_signals():
            with bar:
                while self.step < args.training_steps:
                    batch, output, scale = self._update(model, optimizer, batches)
                    is_last = self.step == args.training_steps
                    if self.step % args.log_interval == 0 or is_last or self.step == 1:
                        row = self._log_row(batch, output, optimizer.param_groups[0]["lr"], scale)
                        self._write_row(row)
                        bar.set_postfix(progress_figures(row))
                        if self.step == 1:
                            warn_if_wide(output.features, self.config)
                        if not warned and self.step >= args.training_steps / 4:
                            warned = warn_if_dense(row, self.config)
                    bar.update()
                    if not is_last and self.heldout is not None and is_due(self.step, args.eval_interval):
                        self._evaluate_and_write(optimizer)
                        model.train()
                        self._log_clock = time.perf_counter()
                    if not is_last and is_due(self.step, args.checkpoint_interval):
                        self._save(optimizer)
                    if not is_last and is_due(self.step, args.hub_push_interval):
                        self._push_meanwhile()
            if self.heldout is not None:
                self._evaluate_and_write(optimizer)
            self.model.eval()
            # The first two are accelerate's, which round to half precision.
            for name in ("forward", "_original_forward", "threshold_decay"):
                vars(self.model).pop(name, None)
            self._read_clocks()
            # Where processes share the features they exchange weights in it, and cannot fail together.
            with self._checkpoint_on_failure(optimizer, alone=self.shard is not None):
                together(accelerator, self._release) if self.shard is None else self._release()
        if self.buffer.skipped_tokens:
            logger.warning("%d tokens were skipped: their activations were not finite", self.buffer.skipped_tokens)
        wait_for_all(accelerator)
        finish_trackers(accelerator)
        if args.push_to_hub:  # last, so that no process waits for the upload of another until it times out
            self._push()
        return self.model

    def _update(self, model, optimizer, batches) -> tuple[dict, CLTOutput, float]:
        """One optimizer update, on `gradient_accumulation_steps` batches; the last batch, its output, λ's scale."""
        args, accelerator = self.args, self.accelerator
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(
                self.step, args.training_steps, args.num_warmup_steps, args.lr_scheduler, args.decay_steps
            )
        if args.initial_k is not None:
            self.model.training_k = annealed_k(self.step, self.config.k, args.initial_k, args.num_k_anneal_steps)
        if self.config.activation_fn == "batchtopk" and restarts_threshold(self.step, args.training_steps):
            self.model.restart_running_thresholds()
        scale = sparsity_scale(self.step, args.training_steps, args.sparsity_schedule, args.sparsity_delay_steps)
        # Whether any feature is dead is asked now and then, since a GPU has to be waited for.
        if self.step % max(1, args.dead_feature_window // 100) == 0:
            dead = self._dead()
            self._revives = dead is not None and any_process(accelerator, bool(dead.any()))
        dead = self._dead() if self._revives else None
        fired = torch.zeros_like(self.steps_since_fired)
        # Where a later batch of the update fails, or that of another process, this is what to save: the batches that
        # were read for it were for nothing.
        several = args.gradient_accumulation_steps > 1 or accelerator.num_processes > 1
        may_fail = self._num_agreed < args.gradient_accumulation_steps
        before = self._moving_state() if several and may_fail else None
        # Until its memory is filled, the threshold is the mean over the batches since it was started anew.
        batches_since = self.step - last_restart(self.step, args.training_steps)
        batches_since *= args.gradient_accumulation_steps
        for micro_step in range(args.gradient_accumulation_steps):
            self.model.threshold_decay = min(THRESHOLD_DECAY, 1 - 1 / (batches_since + micro_step + 1))
            is_full = self._num_agreed > 0
            with self._checkpoint_on_failure(optimizer, before):
                batch = self._next_batch(batches, micro_step)
            batch = {name: rows.to(accelerator.device) for name, rows in batch.items()}
            self._tokens_since_log += len(batch["inputs"])
            batch = gather_tokens(self.shard, batch, equally_many=is_full)
            is_last = micro_step == args.gradient_accumulation_steps - 1
            with self._stopwatch.running(), rounded_products(accelerator.device, args.mixed_precision != "no"):
                with nullcontext() if is_last else accelerator.no_sync(model):
                    output = model(**batch, sparsity_scale=scale, dead=dead)
                    accelerator.backward(output.loss / args.gradient_accumulation_steps)
                fired += output.features.active_counts()
                losses = torch.stack([getattr(output, name).detach().float() for name in LOSSES])
                self._totals += losses / args.gradient_accumulation_steps
        with self._stopwatch.running():
            self._average_over_replicas()
            if args.max_grad_norm > 0:
                clip_grad_norm(accelerator, self.model, args.max_grad_norm)
            fired = self._sum_over_replicas(fired)
            optimizer.step()
            optimizer.zero_grad()
            if self.shard is not None and self.config.activation_fn == "batchtopk":
                self._copy_from_first_replica([threshold.value for threshold in self.model.thresholds])
            self.steps_since_fired = torch.where(fired > 0, 0, self.steps_since_fired + 1)
        self.step += 1
        self._updates_since_log += 1
        return batch, output, scale

    def _next_batch(self, batches, micro_step: int) -> dict:
        """
        The next batch of this process. Reading can fail in one process, and then fails in all, for which they have to
        ask each other; so they agree on a number of batches that all of them have ready, ASK_SECONDS of them at most.
        The next question then begins an update, where a run may stop.
        """
        if self._num_agreed > 0:
            self._num_agreed -= 1
            return next(batches)

        def read() -> dict:
            if self._interrupted and micro_step == 0:
                raise StopRequested
            return next(batches)

        batch = together(self.accelerator, read)
        if self.accelerator.num_processes > 1:
            now = time.perf_counter()
            per_batch = (now - self._asked_at) / (self._num_before + 1)
            in_time = int(ASK_SECONDS / max(per_batch, 1e-6))
            steps = self.args.gradient_accumulation_steps
            number, rest = least(self.accelerator, min(self.buffer.num_ready, in_time)), steps - 1 - micro_step
            if number >= rest:
                number -= (number - rest) % steps
            self._num_agreed = self._num_before = number
            self._asked_at = now
        return batch

    @torch.no_grad()
    def _copy_from_first_replica(self, tensors: list[torch.Tensor]) -> None:
        """Gives all processes with the same features the values of the first, as DistributedDataParallel does."""
        if self.layout.replicas is None:
            return
        first = dist.get_global_rank(self.layout.replicas, 0)
        for tensor in tensors:
            dist.broadcast(tensor, src=first, group=self.layout.replicas)

    def _average_over_replicas(self) -> None:
        """Averages the gradients of all processes with the same features, unless DistributedDataParallel did."""
        if self.layout.replicas is None:
            return
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.layout.num_replicas
                dist.all_reduce(parameter.grad, group=self.layout.replicas)

    def _sum_over_replicas(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all processes with the same features."""
        if self.shard is None:
            return self.accelerator.reduce(counts, "sum")
        if self.layout.replicas is not None:
            dist.all_reduce(counts, group=self.layout.replicas)
        return counts

    def _dead(self) -> torch.Tensor | None:
        """
        Features of this process that did not fire for a whole window, (L, F) bool; None before the first window is
        over.
        """
        if self.step < self.args.dead_feature_window:
            return None
        return self.steps_since_fired >= self.args.dead_feature_window

    @torch.no_grad()
    def _log_row(self, batch, output, learning_rate, scale) -> dict:
        """The line of `metrics.jsonl` for this step: means since the last line; NMSE and L0 of the last batch."""
        accelerator = self.accelerator
        losses = accelerator.reduce(self._totals / self._updates_since_log, "mean").tolist()
        if not all(map(torch.isfinite, torch.tensor(losses))):
            wider = "" if self.model.dtype == torch.float32 else ", or use clt_dtype='float32'"
            raise FloatingPointError(
                f"the loss is not finite at step {self.step} ({dict(zip(LOSSES, losses, strict=True))}); lower "
                f"learning_rate={self.args.learning_rate:g}{wider}"
            )
        sums = MetricSums(self.config.num_layers, self.config.d_model, self.model.num_held, accelerator.device)
        sums.update(batch["labels"], output.reconstruction.detach(), output.features)
        metrics = self._gathered(sums).compute()
        dead = self._dead()
        if dead is not None:
            num_dead = sum_over(self.shard, dead.sum(dim=1))
            dead = num_dead.float() / self.config.num_features
        tokens = int(accelerator.reduce(torch.tensor(self._tokens_since_log, device=accelerator.device), "sum"))
        self.tokens_seen += tokens
        self._read_clocks()
        now = time.perf_counter()
        seconds, self._log_clock = now - self._log_clock, now
        self._totals.zero_()
        self._tokens_since_log = self._updates_since_log = 0
        row = {"step": self.step, "split": "train", **dict(zip(LOSSES, losses, strict=True))}
        for name in ("nmse", "explained_variance", "l0"):
            row[name] = metrics[name]
            row[f"{name}_per_layer"] = metrics[f"{name}_per_layer"]
        if "layers_without_nmse" in metrics:
            row["layers_without_nmse"] = metrics["layers_without_nmse"]
        row["dead_fraction"] = None if dead is None else dead.mean().item()
        row["dead_fraction_per_layer"] = None if dead is None else dead.tolist()
        row["learning_rate"] = learning_rate
        row["sparsity_scale"] = scale
        row["epoch"] = self.buffer.epoch
        row["tokens"] = self.tokens_seen
        if self._skip_bad:
            skipped = torch.tensor(self.buffer.skipped_tokens, device=accelerator.device)
            row["skipped_tokens"] = int(accelerator.reduce(skipped, "sum"))
        row["tokens_per_second"] = tokens / seconds
        return row

    def _write_row(self, row: dict) -> None:
        """Appends a line to `metrics.jsonl` and sends it to the trackers."""
        if not self.accelerator.is_main_process:
            return
        try:
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(as_json(row, indent=None))
        except OSError as error:
            raise OSError(
                f"metrics.jsonl cannot be written to {str(self.output_dir)!r} ({error.strerror}); "
                f"{newest_usable(self.output_dir)}"
            ) from error
        log_row(self.accelerator, row)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        if self.last_evaluation is not None and self.last_evaluation[0] == self.step:
            return self.last_evaluation[1]
        self.model.eval()
        sums = MetricSums(self.config.num_layers, self.config.d_model, self.model.num_held, self.accelerator.device)
        bar = tqdm(
            total=self.args.eval_tokens, desc="Evaluating", unit="token", disable=not self._progress, leave=False
        )
        dtype = torch.promote_types(self.buffer.dtype, torch.float32)

        def measure() -> None:
            rows = activations(self.harvester, self.heldout, self.args.batch_size, dtype, self._skip_bad)
            if self.shard is not None:
                rows = self._in_lockstep(rows)
            for batch in rows:
                if self._interrupted and self.shard is None:
                    raise StopRequested
                with self._stopwatch.running():
                    # Not `self.model(...)`: with mixed precision accelerate made that round raw activations.
                    output = CrossLayerTranscoder.forward(self.model, batch["inputs"].to(self.accelerator.device))
                sums.update(batch["labels"], output.reconstruction, output.features)
                bar.update(len(batch["inputs"]))

        # What is released now is measured as its files have it; else the live CLT, which is the same but for rounding.
        is_released = self.step == self.args.training_steps or is_due(self.step, self.args.hub_push_interval)
        with self.model.folded() if is_released else nullcontext():
            with bar:
                together(self.accelerator, measure) if self.shard is None else measure()
            metrics = self._gathered(sums).compute()
            if self.args.eval_replacement and self.step == self.args.training_steps:
                metrics |= self._measure_replacement()
        self.last_evaluation = (self.step, metrics)
        return metrics

    def _measure_replacement(self) -> dict:
        """The metrics of the language model with its MLPs replaced by the CLT, on the held-out text."""
        batches = together(self.accelerator, lambda: list(self.heldout))  # what fails in reading fails here
        alone = self.accelerator.num_processes == 1

        def stop_if_asked():
            if self._interrupted and alone:
                raise StopRequested

        def total(sums):
            return self.accelerator.reduce(sums, "sum")

        return replacement_metrics(
            self.harvester.model,
            self.model,
            batches,
            reduce=None if alone else total,
            progress=self._progress,
            before_batch=stop_if_asked,
        )

    def _evaluate_and_write(self, optimizer) -> None:
        """Evaluates, unless that was done before this run went on; the last metrics are for the card as well."""
        if self.step == self._last_written and self.step < self.args.training_steps:
            return
        with self._checkpoint_on_failure(optimizer):
            metrics = self.evaluate()
        if self.step != self._last_written:
            self._write_row({"step": self.step, "split": "heldout", **metrics})
            self._last_written = self.step

    def _in_lockstep(self, rows):
        """The batches of the processes that share the features, together, until the last of all processes runs out."""
        rows = iter(rows)
        nothing = torch.empty(0, self.config.num_layers, self.config.d_model)

        def read() -> dict:
            if self._interrupted:
                raise StopRequested
            return next(rows, {"inputs": nothing, "labels": nothing})

        while True:
            own = together(self.accelerator, read)
            batch = gather_tokens(self.shard, {n: tensor.to(self.accelerator.device) for n, tensor in own.items()})
            has_rows = len(batch["inputs"]) > 0
            # Reading is agreed on by all processes, so a group that has run out goes on for those that have not.
            if not any_process(self.accelerator, has_rows):
                return
            if has_rows:
                yield batch

    def _gathered(self, sums: MetricSums) -> MetricSums:
        parts = gather(self.accelerator, sums.tensors())
        if self.shard is not None:
            parts = MetricSums.with_joined_features(parts, self.shard.size)
        return MetricSums.from_gathered(parts)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @contextmanager
    def _checkpoint_on_failure(self, optimizer, before: tuple[dict, dict] | None = None, alone: bool = False):
        """
        If the block fails, in all processes, a checkpoint is written, and a note on the error says what to go on from.
        Where one process may fail `alone` it cannot write a checkpoint, and the note names the newest.
        """
        try:
            yield
        except (Exception, StopRequested) as error:
            try:
                is_one = self.accelerator.num_processes == 1
                can_save = is_one or not (alone or isinstance(error, OtherProcessGone))
                if can_save and self.step > 0 and self._saved_step != self.step:
                    self._save(optimizer, before)
                if isinstance(error, StopRequested) and self.step > 0:
                    error.args = (f"stopped at step {self.step}",)
                error.add_note(newest_usable(self.output_dir))
            except CheckpointError as failure:
                if isinstance(error, StopRequested):
                    raise
                error.add_note(str(failure))
            raise

    def _moving_state(self) -> tuple[dict, dict]:
        """What changes between two updates: `own` of a checkpoint, and the model's buffers (running thresholds)."""
        values, tensors = self.buffer.state_dict()
        values = {
            "buffer": values,
            "tokens_since_log": self._tokens_since_log,
            "updates_since_log": self._updates_since_log,
        }
        tensors |= {"torch_rng": torch.get_rng_state(), "totals": self._totals.clone()}
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        return {"values": values, "tensors": tensors}, buffers

    def _save(self, optimizer, before: tuple[dict, dict] | None = None) -> Path:
        """
        Writes a checkpoint; with the state `before` the update that is going on, if that is given. One of weights that
        are not finite would in time take the place of the last good one: it raises [`CheckpointError`].
        """
        names = [name for name, _ in self.model.named_parameters()]
        lowest = [-torch.inf if name.startswith("thresholds.") else 0.0 for name in names]  # log θ of θ = 0
        weights = zip(self.model.parameters(), lowest, strict=True)
        is_bad = torch.stack([~(p.isfinite() | (p == low)).all() for p, low in weights])
        if any_process(self.accelerator, bool(is_bad.any())):
            bad = [name for name, found in zip(names, is_bad.tolist(), strict=True) if found]
            raise CheckpointError(
                f"step {self.step} is not saved: {bad[0] if bad else 'a weight of another process'} is not finite; "
                f"lower learning_rate={self.args.learning_rate:g}; {newest_usable(self.output_dir)}"
            )
        self._read_clocks()
        own, buffers = self._moving_state() if before is None else before
        # Since `before`, other tokens may have taken the place of those that were unread then.
        if self.args.checkpoint_activations and before is None:
            own["tensors"] |= self.buffer.unread_activations()
        shared = {
            "model": {**self.model.state_dict(), **buffers},
            "optimizer": optimizer_tensors(self.model, optimizer),
            "trainer": {"steps_since_fired": self.steps_since_fired},
            "state": {
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "seconds": self.seconds,
                "run_id": self._run_id,
                "num_processes": self.accelerator.num_processes,
                "feature_parallel_size": self.args.feature_parallel_size,
                "config": self.config.to_dict(),
                "args": self.args.to_dict(),
                "activations": self._fingerprint,
                "revives": self._revives,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            },
        }
        folder = save_checkpoint(
            self.output_dir, self.step, shared, own, self.accelerator, self.args.save_total_limit, self.shard
        )
        self._saved_step = self.step
        if self.accelerator.is_main_process and self._progress:
            tqdm.write(f"checkpoint written: {folder}")
        return folder

    def _begin(self) -> torch.optim.Optimizer:
        self._prepare_model()
        return make_optimizer(self.model, self.args)

    def _resume(self) -> torch.optim.Optimizer:
        """
        Goes where the checkpoint stands. Its tensors are mapped from their files and count as memory of the process
        where they were read, so each part is let go of when it is copied, and nothing keeps a view.
        """
        shared, own = load_checkpoint(
            self.resume_from,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.shard,
            self.model.per_feature(),
        )
        self._restore_model(shared["state"], shared.pop("model"))
        optimizer = make_optimizer(self.model, self.args)
        load_optimizer_tensors(self.model, optimizer, shared.pop("optimizer"))
        self._restore_run(shared, own)
        return optimizer

    def _restore_model(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """
        Weights and statistics of a checkpoint. The configuration, the language model and what cannot change within a
        run must be those it was written with; other settings that differ are said.
        """
        saved = state["config"]
        for name in CLT_CONFIG_HELP:
            now = getattr(self.config, name)
            if saved[name] != now and not name.startswith("base_model"):
                raise ValueError(
                    f"{name}={now!r}, but {self.resume_from.name} was trained with {name}={saved[name]!r}; resume "
                    "with the same configuration"
                )
        before = state.get("activations", self._fingerprint)  # of a version that did not keep it
        if type(before) is not type(self._fingerprint) or not self.harvester.has_fingerprint(before):
            what = "activation_cache" if self.args.activation_cache is not None else "model"
            raise ValueError(
                f"{what}={getattr(self.args, what)!r} gives other activations than those that {self.resume_from.name} "
                f"was trained on, of {state['args'].get(what)!r}; resume with these, or begin a run with init_from"
            )
        changed = self.args.changed_since(state["args"])
        if isinstance(before, dict) and before["dtype"] == self._fingerprint["dtype"]:
            changed.pop("model_dtype", None)  # said in another way, or by the device
        for name in FIXED:
            if name in changed:
                raise ValueError(
                    f"{name}={changed[name][1]!r}, but {self.resume_from.name} was trained with "
                    f"{name}={changed[name][0]!r}; resume with the same"
                )
        if changed and self.accelerator.is_main_process:
            told = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
            logger.warning("%s was trained with other settings, and goes on with: %s", self.resume_from.name, told)
        if "mean_in" in tensors:
            self.model.set_normalization(*(tensors[n] for n in ("mean_in", "std_in", "mean_out", "std_out")))
        self.model.load_state_dict(tensors)

    def _restore_run(self, shared: dict, own: dict) -> None:
        state = shared["state"]
        self.steps_since_fired.copy_(shared["trainer"]["steps_since_fired"])
        self.step, self.tokens_seen, self.seconds = state["step"], state["tokens_seen"], state["seconds"]
        self._saved_step = self.step if self._goes_on else None
        self._run_id = state.get("run_id", self._run_id) if self._goes_on else self._run_id
        self._revives = state.get("revives", True)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._tokens_since_log = own["values"]["tokens_since_log"]
        self._updates_since_log = own["values"]["updates_since_log"]
        self._totals.copy_(own["tensors"]["totals"])
        self.buffer.load_state_dict(own["values"]["buffer"], own["tensors"])
        torch.set_rng_state(own["tensors"]["torch_rng"])

    def _prepare_output_dir(self) -> None:
        """Makes the folder, without what the run would contradict: an overwritten run, or what came after a resume."""
        if not self.accelerator.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.output_dir)
        remove_leftovers(self.output_dir)
        shutil.rmtree(self.output_dir / MEANWHILE, ignore_errors=True)  # of a run that was stopped in a push
        if self._goes_on:
            # In this order: the newest checkpoint, whichever that is after a crash, has all its lines of metrics.
            remove_checkpoints_after(self.output_dir, self.step)
            truncate_metrics(self.output_dir / "metrics.jsonl", self.step)
        elif self.args.overwrite_output_dir:
            remove_run(self.output_dir)

    @contextmanager
    def _catching_signals(self):
        """
        Ctrl-C and SIGTERM let the step end and a checkpoint be written; while text is waited for, which can take
        minutes, they end the wait. When all updates are done, an evaluation is broken off, and a release is not. A
        second Ctrl-C stops at once.
        """

        def request_stop(signum, frame):
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            waiting = any(text is not None and text.is_reading for text in (self.buffer.tokens, self.heldout))
            if self.accelerator.is_main_process:
                first = "" if waiting else "what is being computed is finished, then "
                tqdm.write(f"stopping: {first}a checkpoint is written (Ctrl-C again: stop at once)")
            if waiting:
                raise StopRequested

        try:
            before = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where no handler can be set: Python stops it as usual
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._interrupted = False

    # -- release ------------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Writes the released CLT with its card and plots."""
        self._write_release(self.output_dir)

    def _write_release(self, folder: Path) -> None:
        """Writes the CLT as it is now, its card and plots, with its metrics where it was measured as it is now."""
        self._read_clocks()
        is_main = self.accelerator.is_main_process
        if is_main or (self.shard is not None and self.layout.replica == 0):
            self.model.save_pretrained(folder, is_main_process=is_main)
        if not is_main:
            return
        step, metrics = self.last_evaluation or (None, None)
        save_model_card(
            folder,
            CLTConfig.from_pretrained(folder),  # of the release, which may be untied where the live one is not
            metrics if step == self.step else None,
            self.training_facts(),
            command_line(self.accelerator.num_processes),
            license=self.args.license,
            history=read_history(self.output_dir),
        )

    # -- the Hub ------------------------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str | None = None, **kwargs):
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

    def _push(self) -> None:
        """Pushes the finished CLT after a push that may still be under way; a note on an error says what is safe."""
        meanwhile = self.output_dir / MEANWHILE
        if self.background_push is not None:
            self.background_push.wait()
            if self.accelerator.is_main_process:
                shutil.rmtree(meanwhile, ignore_errors=True)
        try:
            self.push_to_hub()
        except Exception as error:
            repository = self.args.hub_model_id
            error.add_note(
                f"the CLT is finished, in {str(self.output_dir)!r}; push it with `hf-clt push {self.output_dir} "
                f"{repository}`"
            )
            raise

    def _push_meanwhile(self) -> None:
        """Writes the CLT as it is now beside the output and begins to push it, unless a push is under way."""
        if any_process(self.accelerator, self.background_push.is_running):
            logger.info("step %d: the push before is still under way, this one is left out", self.step)
            return
        folder = self.output_dir / MEANWHILE
        self._write_release(folder)
        if self.accelerator.is_main_process:
            self.background_push.start(folder, f"Step {self.step}")

    def training_facts(self) -> dict:
        """What the model card says about the run; only what is known."""
        args = self.args
        settings = {**args.non_default(), **non_default_config(self.config)}
        for name in ("output_dir", "resume_from_checkpoint", "overwrite_output_dir"):
            settings.pop(name, None)
        return {
            "dataset": args.dataset,
            "dataset_config": args.dataset_config,
            "dataset_split": args.dataset_split,
            "context_size": args.context_size,
            "eval_tokens": args.eval_tokens,
            "prepend_bos": self.tokens.prepend_bos,
            "normalization_method": args.normalization_method,
            "num_processes": self.accelerator.num_processes,
            "steps": self.step,
            "tokens": self.tokens_seen,
            "duration_seconds": self.seconds["total"],
            "hardware": hardware(self.accelerator),
            "settings": settings,
            "versions": versions(),
        }

    def _read_clocks(self) -> None:
        """Brings `seconds` up to now."""
        now = time.perf_counter()
        self.seconds["total"] += now - self._clock
        self.seconds["language_model"] += self.harvester.stopwatch.take()
        self.seconds["clt"] += self._stopwatch.take()
        self._clock = now

    def time_shares(self) -> dict[str, float]:
        """
        Share of the wall time of `train` spent in the language model, in the CLT, and elsewhere; the first two overlap
        on a GPU with `overlap_harvest`.
        """
        self._read_clocks()
        total = max(self.seconds["total"], 1e-9)
        shares = {name: self.seconds[name] / total for name in ("language_model", "clt")}
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def clip_grad_norm(accelerator, clt: CrossLayerTranscoder, max_norm: float) -> None:
    """
    Scales the gradients to a norm of at most `max_norm`. On a CPU, where looking at the norm costs nothing and writing
    all gradients again much, only when it is larger; on a GPU always, without waiting for the norm.
    """
    if clt.shard is None and accelerator.device.type != "cpu":
        accelerator.clip_grad_norm_(clt.parameters(), max_norm)  # which undoes the scaling of float16 as well
        return
    norm = total_grad_norm(clt)
    if accelerator.device.type != "cpu" or not norm <= max_norm:  # NaN as well: it shall stop the run
        torch.nn.utils.clip_grads_with_norm_(clt.parameters(), max_norm, norm)


def total_grad_norm(clt: CrossLayerTranscoder) -> torch.Tensor:
    """The norm of all gradients. Where several share the features, output biases and skips, on each, count once."""
    names = clt.per_feature()
    gradients = {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}
    of_features = torch.nn.utils.get_total_norm([grad for name, grad in gradients.items() if name in names])
    of_outputs = torch.nn.utils.get_total_norm([grad for name, grad in gradients.items() if name not in names])
    return (sum_over(clt.shard, of_features.square()) + of_outputs.square()).sqrt()


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def warn_if_wide(features: SparseFeatures, config: CLTConfig) -> None:
    """Warns when jumprelu's straight-through window holds so many features that computing only these saves nothing."""
    layers = features.layers
    listed = sum(layer.indices.numel() for layer in layers)
    share = listed / max(1, layers[0].num_tokens * layers[0].num_features * len(layers))
    if config.activation_fn == "jumprelu" and share > WIDE_WINDOW:
        logger.warning(
            "%.0f %% of the features are active or inside the jumprelu window (jumprelu_bandwidth=%g): every step is "
            "as slow as a dense one; a smaller jumprelu_bandwidth makes it faster",
            100 * share,
            config.jumprelu_bandwidth,
        )


def warn_if_dense(row: dict, config: CLTConfig) -> bool:
    """Warns when after a quarter of training more than a tenth of the features are active; says whether it did."""
    per_layer = row["l0"] / config.num_layers
    if per_layer <= config.num_features / 10:
        return False
    logger.warning(
        "step %d: %.0f of %d features per layer are active on a token, more than a tenth; such a CLT is neither "
        "sparse nor fast: %s",
        row["step"],
        per_layer,
        config.num_features,
        "lower k" if config.activation_fn in TOPK_FAMILY else "raise sparsity_lambda, or use batchtopk",
    )
    return True


__all__ = ["CLTTrainer"]
