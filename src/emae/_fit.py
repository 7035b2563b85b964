"""fit: the one training loop. What differs between runs is the step it is given."""

import math
import time
from collections.abc import Callable

import torch

from emae._experiments import Schedule
from emae._runs import KEEP, Run
from emae._volume import check_free_space

Step = Callable[[int], dict[str, torch.Tensor]]
"""step(i) -> {"loss": ..., more to report}: the loss of the crops of step i, ready for backward"""
Validate = Callable[[int], dict[str, float]]


def rate_at(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then cosine to 0 at the last step."""
    if step < schedule.warmup:
        return schedule.rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: torch.nn.Module, schedule: Schedule, encoder_rate: float = 1.0) -> list[dict]:
    """Weight decay for matrices and kernels only; the encoder may learn at a lower rate."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        key = name.startswith("encoder."), parameter.ndim > 1
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "weight_decay": schedule.weight_decay if decays else 0.0,
             "share": encoder_rate if encoder else 1.0}
            for (encoder, decays), parameters in sorted(groups.items())]


def fit(model: torch.nn.Module, step: Step, validate: Validate, schedule: Schedule, run: Run, *,
        encoder_rate: float = 1.0, resume: bool = False, say: Callable[[str], None] = print) -> None:
    """Train `model` in place for `schedule.steps` steps, reporting to and checkpointing in `run`.

    Resumed at the newest checkpoint it ends, on a CPU with as many threads, in the same weights bit for bit.
    ArithmeticError where loss or gradient are no longer finite: the last checkpoint is left as it was.
    """
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    check_free_space(run.folder, 3 * (KEEP + 1) * nbytes, run.name)  # weights and two moments a checkpoint
    optimiser = torch.optim.AdamW(parameter_groups(model, schedule, encoder_rate), lr=schedule.rate, betas=(0.9, 0.98))
    first = run.load_checkpoint(model, optimiser) if resume else 0
    if first:
        say(f"resumed at step {first} of {schedule.steps}")
    seen: list[dict[str, torch.Tensor]] = []
    started = time.perf_counter()
    before = next((m for m in reversed(run.metrics()) if "seconds" in m), {}) if first else {}
    computed = time.process_time()
    model.train()
    for i in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(i, schedule) * group["share"]
        out = step(i)
        out["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen.append({k: v.detach() for k, v in out.items()} | {"gradient_norm": norm})

        done, last = i + 1, i + 1 == schedule.steps
        saves = done % schedule.checkpoint_every == 0 or last
        if done % schedule.report_every == 0 or saves:  # so what is saved is sound, and no mean is cut by a resume
            means = {k: float(torch.stack([s[k] for s in seen]).mean()) for k in seen[0]}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(means[name]):
                    raise ArithmeticError(f"{run.name}: the {name.replace('_', ' ')} is {means[name]} near step {done};"
                                          " start another run with a lower schedule.rate (the last checkpoint is good)")
            elapsed = time.perf_counter() - started
            pace = (done - first) / elapsed
            seen.clear()
            run.report(step=done, **means, rate=rate_at(i, schedule), steps_per_second=round(pace, 3),
                       seconds=round(before.get("seconds", 0.0) + elapsed, 1),
                       cpu_seconds=round(before.get("cpu_seconds", 0.0) + time.process_time() - computed, 1))
            say(f"step {done}/{schedule.steps}  loss {means['loss']:.4f}  {pace:.2f} steps/s  "
                f"{(schedule.steps - done) / pace / 60:.1f} min left")
        if done % schedule.validate_every == 0 or last:
            model.eval()
            with torch.no_grad():
                looked = validate(done)
            model.train()
            if looked:
                run.report(step=done, **looked)
                say("  " + "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in looked.items()))
        if saves:
            run.save_checkpoint(done, model, optimiser)
    model.eval()
    run.save_weights(model)
