"""
Adam with moments in float32, and an Adam whose state takes a quarter of its memory, or none.

A CLT's decoders have of the order of L²/2 · F · D parameters, and Adam keeps two float32 numbers for each. What
[`CompactAdam`] keeps is chosen for decoder and encoder rows, which belong to a feature:

- One second moment per feature. The gradient of a feature's rows is a sum over the few tokens on which it fires: it
  comes and goes for all of them together, and with normalised activations it has much the same size in all dimensions.
- The first moment as half of a float: not the moment itself, whose size spans many orders of magnitude, but the
  moment divided by its feature's root mean square, which is what the update needs and stays near 1. float16 then
  rounds to 1 part in 2048, against 1 in 256 for bfloat16, and never underflows to numbers that slow a CPU down.
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..kernels import triton_adam
from ..modeling_clt import CrossLayerTranscoder
from ..sharding import sum_over
from .arguments import CLTTrainingArguments


# Elements that each thread works on at a time: the block of gradients and the float32 copy of its moments stay in a
# core's second-level cache.
CPU_BLOCK = 2**16

HALF_MAX = torch.finfo(torch.float16).max


class _Stepping(torch.optim.Optimizer):
    """
    What both optimizers have in common. On a GPU a step is one kernel for all parameters of the same formats
    (`kernels/triton_adam.py`), elsewhere one parameter after another (`_update`). Weights in bfloat16 are rounded at
    random. The state keeps its number formats on loading; `step` is on the host, so that no step waits for a device.

    `seed` is that of the rounding. `clip_factor`, (), is what the next step, and only that, multiplies gradients with,
    on their device; None: 1.
    """

    seed = 0
    clip_factor: Tensor | None = None

    def load_state_dict(self, state_dict: dict) -> None:
        # torch's own converts every state to the parameter's number format, and accelerate loads each optimizer once
        # to place it: u would become float32, and lose bits under a bfloat16 parameter.
        super().load_state_dict({**state_dict, "state": {}})
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                if index in state_dict["state"]:
                    self.state[parameter] = {
                        name: value.to("cpu" if name == "step" else parameter.device)
                        for name, value in state_dict["state"][index].items()
                    }

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; `closure`, if given, computes the loss to return."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, self.clip_factor = self.clip_factor, None
        taken, number = {}, 0  # by device
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state.update(self._initial_state(parameter, group))
                state["step"] += 1
                step = int(state["step"])
                key = triton_adam.rounding_key(self.seed, step, number)
                if triton_adam.takes(parameter):
                    what = parameter, state, key, self._numbers(group, step)
                    taken.setdefault(parameter.device, []).append(what)
                else:
                    self._update(parameter, state, key, group, step, factor)
        for steps in taken.values():
            self._launch(steps, factor)
        return loss


class WideAdam(_Stepping, torch.optim.AdamW):
    """
    AdamW with both moments in float32 whatever the weights' format: in bfloat16 the second one would never fall, since
    0.999 v rounds back to v. A step is computed in float32 and rounded once. On a CPU it is torch's fused one.
    """

    def _initial_state(self, parameter: Tensor, group: dict) -> dict[str, Tensor]:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}

    def _numbers(self, group: dict, step: int) -> tuple[float, ...]:
        """Those of the kernel; the correction of the second moment goes to eps and rate, as in [`CompactAdam`]."""
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1 - beta2**step)
        rate = -group["lr"] / (1 - beta1**step) * correction
        return group["eps"] * correction, rate, 1 - group["lr"] * group["weight_decay"], 1 - beta1, 1 - beta2

    def _launch(self, steps: list[tuple], factor: Tensor | None) -> None:
        triton_adam.wide_step(steps, factor)

    def _update(self, parameter, state, key, group, step, factor) -> None:
        """A step by torch's fused Adam, of narrower weights on copies of some of them at a time."""
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        settings |= {"fused": True, "amsgrad": False, "maximize": False}
        if factor is not None:
            settings["grad_scale"] = factor.reciprocal()
        before = torch.full((), step - 1.0, device=parameter.device)  # to which one is added
        moments = state["exp_avg"], state["exp_avg_sq"]
        if parameter.dtype == moments[0].dtype:
            adamw([parameter], [parameter.grad], *([moment] for moment in moments), [], [before], **settings)
            return
        start = 0
        tensors = parameter, parameter.grad, *moments
        size = CPU_BLOCK * torch.get_num_threads()
        blocks = zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)
        for weights, gradient, *some in blocks:
            wide, gradient = weights.to(some[0].dtype), gradient.to(some[0].dtype)
            adamw([wide], [gradient], *([moment] for moment in some), [], [before.clone()], **settings)
            if weights.dtype == torch.bfloat16:
                triton_adam.round_stochastically_(wide, key, start)
            weights.copy_(wide)
            start += len(weights)


class CompactAdam(_Stepping):
    """
    Adam with one second moment per feature and a first moment in 2 bytes per parameter.

    For a parameter of two or more dimensions, of which the first is features f, with gradient g:

        v_f = beta2 · v_f + (1 - beta2) · mean(g_f²)
        m   = beta1 · m + g
        u   = m / (sqrt(v_f / (1 - beta2^t)) + eps)
        w   = w - lr · weight_decay · w - lr · (1 - beta1) / (1 - beta1^t) · u

    Adam has v for each element. What is stored is v, its root, and in place of m the quotient of m and that root, in
    float16: 2 bytes per parameter in place of Adam's 8. With beta1 = 0 there is no m to store. Each element of a
    one-dimensional parameter (bias, threshold) is a feature of its own, and nothing of it is kept in float16. Sums are
    in float32 or better whatever the parameter's type.

    No step waits for the device, and on a GPU it is one kernel for all parameters of the same formats and about as
    long rows (`kernels/triton_adam.py`). `load_state_dict` keeps the number formats of the state.

    Args:
        params: Parameters, or groups of them with their own settings; as in torch.optim.
        lr (`float`, defaults to 1e-3): Learning rate.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.999)`): Decay of the first and the second moment.
        eps (`float`, defaults to 1e-8): Added to the root of the second moment.
        weight_decay (`float`, defaults to 0): Decoupled, as in AdamW.

    Raises:
        ValueError: For a setting out of range, and for betas with which the quotient could exceed float16.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} is negative; give 0 or more")
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}={beta} is out of range; give at least 0 and less than 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            _check_range(parameter, *group["betas"])

    def _initial_state(self, parameter: Tensor, group: dict) -> dict[str, Tensor]:
        """Zeros: second_moment and denominator (first dimension,), update (as the parameter)."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        names = ("second_moment", "denominator")
        state = {name: torch.zeros(len(parameter), dtype=dtype, device=parameter.device) for name in names}
        if group["betas"][0]:
            state["update"] = torch.zeros_like(parameter, dtype=torch.float16 if parameter.dim() > 1 else dtype)
        return state

    def _numbers(self, group: dict, step: int) -> tuple[float, ...]:
        """
        What is added to the root of the second moment at this step, what the quotient of the moment and that is
        multiplied with, what weight decay leaves of a weight, and the betas. The correction of v is one factor for all
        features, and so goes to the first two.
        """
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1 - beta2**step)
        rate = -group["lr"] * (1 - beta1) / (1 - beta1**step) * correction
        return group["eps"] * correction, rate, 1 - group["lr"] * group["weight_decay"], beta1, beta2

    def _launch(self, steps: list[tuple], factor: Tensor | None) -> None:
        triton_adam.compact_step(steps, factor)

    def _update(self, parameter, state, key, group, step, factor) -> None:
        """The formula in torch's operators: what is computed where the kernel cannot run."""
        eps, rate, kept, beta1, beta2 = self._numbers(group, step)
        # Gradients are not rewritten for clipping: of factor · (g + m / factor) the first factor goes to `inverse`.
        share = beta1 if factor is None else beta1 / factor
        dtype = state["second_moment"].dtype
        state["second_moment"].mul_(beta2)
        state["denominator"].mul_(share)  # of the step before: update · denominator = beta1 · m, over the factor

        rows, columns = len(parameter), parameter.numel() // len(parameter)
        size = max(1, CPU_BLOCK * torch.get_num_threads() // columns)
        tensors = [parameter.view(rows, columns), parameter.grad.reshape(rows, columns)]
        tensors += [state["second_moment"].view(rows, 1), state["denominator"].view(rows, 1)]
        tensors += [state["update"].view(rows, columns)] if beta1 else []
        moment = torch.empty(min(size, rows) if beta1 else 0, columns, dtype=dtype, device=parameter.device)
        start = 0
        for weights, g, v, denominator, *stored in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            norm = torch.linalg.vector_norm(g, dim=1, keepdim=True, dtype=dtype)
            norm = norm if factor is None else norm * factor
            v.addcmul_(norm, norm, value=(1 - beta2) / columns)
            m = g
            if stored:
                m = moment[: len(weights)].copy_(stored[0])
                torch.addcmul(g, m, denominator, out=m)
            inverse = torch.sqrt(v, out=denominator).add_(eps).reciprocal()
            inverse = inverse if factor is None else inverse * factor
            w = weights.float() if weights.dtype == torch.bfloat16 else weights
            if group["weight_decay"]:
                w.mul_(kept)
            w.addcmul_(m, inverse * rate)
            if w is not weights:
                weights.copy_(triton_adam.round_stochastically_(w, key, start))
            if stored:
                stored[0].copy_(m.mul_(inverse))
            start += weights.numel()


def state_entries(optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of what an Adam of torch or a [`CompactAdam`] keeps of a parameter."""
    if not isinstance(optimizer, CompactAdam):
        return {"step", "exp_avg", "exp_avg_sq"}
    moments = {"update"} if any(group["betas"][0] for group in optimizer.param_groups) else set()
    return {"step", "second_moment", "denominator"} | moments


def _check_range(parameter: Tensor, beta1: float, beta2: float) -> None:
    """
    Refuses decays with which m / sqrt(v) could exceed float16.

    m is at most Σ_k beta1^k |g_k| and v at least (1 - beta2) Σ_k beta2^k g_k² / C for a feature of C elements, so that
    m / sqrt(v) is at most sqrt(C / (1 - beta2) / (1 - beta1² / beta2)), by Cauchy and Schwarz.
    """
    if parameter.dim() < 2 or beta1 == 0:
        return
    columns = parameter.numel() // max(1, len(parameter))
    bound = math.sqrt(columns / (1 - beta2) / (1 - beta1**2 / beta2)) if beta1**2 < beta2 else math.inf
    if bound > HALF_MAX:
        raise ValueError(
            f"beta1={beta1}, beta2={beta2} let updates of a feature of {columns} weights exceed float16; take beta2 "
            "further from 1 and beta1 below its root, or Adam"
        )


def make_optimizer(clt: CrossLayerTranscoder, args: CLTTrainingArguments) -> WideAdam | CompactAdam:
    """
    Adam or AdamW, with float32 moments whatever the weights' format, or [`CompactAdam`]; weight decay only on
    matrices, never on biases and thresholds.
    """
    decayed = [p for p in clt.parameters() if p.dim() >= 2]
    others = [p for p in clt.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    optimizer = CompactAdam if args.optimizer == "adam_compact" else WideAdam  # Adam too, which has no weight decay
    optimizer = optimizer(groups, **settings)
    optimizer.seed = args.seed
    return optimizer


def clip_grad_norm(clt: CrossLayerTranscoder, optimizer: WideAdam | CompactAdam, max_norm: float) -> None:
    """
    Scales the gradients of the optimizer's next step to a norm of at most `max_norm`, as
    `torch.nn.utils.clip_grad_norm_` does, without a pass of its own over them, and on a GPU without waiting.
    """
    norm = total_grad_norm(clt)
    is_small = norm.device.type == "cpu" and bool(norm <= max_norm)  # NaN is not, to stop the run
    optimizer.clip_factor = None if is_small else (max_norm / (norm.float() + 1e-6)).clamp(max=1)


def total_grad_norm(clt: CrossLayerTranscoder) -> Tensor:
    """The norm of all gradients. Where several share the features, output biases and skips, on each, count once."""
    gradients = {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}
    if clt.shard is None:
        return _norm(list(gradients.values()))
    names = clt.per_feature()
    of_features = _norm([grad for name, grad in gradients.items() if name in names])
    of_outputs = _norm([grad for name, grad in gradients.items() if name not in names])
    return (sum_over(clt.shard, of_features.square()) + of_outputs.square()).sqrt()


def _norm(gradients: list[Tensor]) -> Tensor:
    if gradients and all(map(triton_adam.takes, gradients)):
        return triton_adam.norm(gradients)
    return torch.nn.utils.get_total_norm(gradients)


__all__ = ["CompactAdam", "WideAdam", "clip_grad_norm", "make_optimizer", "state_entries", "total_grad_norm"]
