"""One training step on the meta device, and what was alive in it."""

import torch

from peft.planning.pretend import backward, on_shapes
from peft.planning.tracker import Tracker, key_of, size_of


class Body:
    """The part of a transformers model below its output layer: when its forward ended, and when its gradient came."""

    def __init__(self, model, tracker):
        self.tracker, self.start, self.end = tracker, None, None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        body = getattr(base, "base_model", base)
        self.handle = body.register_forward_hook(self.ended) if body is not base else None

    def ended(self, module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if torch.is_grad_enabled():
            self.start, self.end = self.tracker.clock, None
            self.below = self.tracker.live
            if hidden.requires_grad:
                hidden.register_hook(self.gradient_came)

    def gradient_came(self, gradient):
        self.end = self.tracker.clock

    def above(self, gradients):
        """Bytes of what came after the body, at its largest; `gradients` are keys of storages that do not count."""
        if self.start is None:
            return 0
        live = self.tracker.timeline[self.start : self.end]
        worst = self.start + 1 + max(range(len(live)), key=live.__getitem__) if live else self.start
        found = max(live, default=self.below) - self.below
        return found - sum(
            size
            for key, (_, size, birth) in self.tracker.alive.items()
            if key in gradients and self.start < birth <= worst
        )


def run(model, make, loss_of, optimizer, accumulate, eval_batch, device, batch, length):
    """The figures of a Plan, as a dict: an optimizer step after the first, when the optimizer has its state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    stored = [*model.parameters(), *model.buffers()]
    tracker = Tracker(stored)
    body = Body(model, tracker)
    peaks = dict.fromkeys(("forward", "backward", "optimizer", "evaluation"), 0)
    try:
        with on_shapes(tracker, device):
            if eval_batch:
                with torch.no_grad():
                    loss_of(model.eval(), make(eval_batch, length))
                peaks["evaluation"] = tracker.peak
            model.train()
            for _ in range(min(accumulate, 2)):
                inputs = make(batch, length)
                before = tracker.mark()
                loss = loss_of(model, inputs)
                peaks["forward"] = max(peaks["forward"], tracker.peak)
                above = loss.nbytes if body.start is None else tracker.born_since(body.start)
                kept = tracker.live - before - above
                tracker.mark()
                backward(loss)
                peaks["backward"] = max(peaks["backward"], tracker.peak)
                del loss, inputs
        gradients = [p.grad for p in trained if p.grad is not None]
        logits = body.above({key_of(gradient) for gradient in gradients})
        peaks["optimizer"] = size_of(gradients) + optimizer.step([p.nbytes for p in trained], torch.device(device).type)
        figures = {"gradients": size_of(gradients), "activations": kept, "logits": logits}
    finally:
        if body.handle is not None:
            body.handle.remove()
        model.zero_grad(set_to_none=True)
    phase = max(peaks, key=peaks.get)
    weights, states = size_of(stored), sum(map(optimizer.kept, trained))
    return {
        **figures,
        "weights": weights,
        "optimizer": states,
        "evaluation": peaks["evaluation"],
        "peak": weights + states + peaks[phase],
        "phase": phase,
    }
