"""MonteCLoRA: in training, A is drawn around its value from a mixture of Gaussians whose spread and weights are learned
(arXiv 2411.04358)."""

from dataclasses import dataclass, field

import torch
from torch import nn

from peft.core.adapter import Mod
from peft.core.validate import check_fields, check_range
from peft.methods.lora.lora import Lora

SMALLEST = {"variance": 1e-3, "spread": 1e-6}


@dataclass
class MontecloraConfig:
    """The mixture that A is drawn from, and the weight of its loss."""

    num_samples: int = field(default=8, metadata={"help": "Gaussians in the mixture"})
    use_entropy: bool = field(
        default=False, metadata={"help": "add the sum of the squared mixture weights to the loss"}
    )
    dirichlet_prior: float = field(default=0.1, metadata={"help": "concentration of the mixture weights' prior"})
    sample_scaler: float = field(default=1e-4, metadata={"help": "factor on what is added to A"})
    kl_loss_weight: float = field(default=1e-5, metadata={"help": "weight of the divergences from the priors"})
    buffer_size: int = field(default=150, metadata={"help": "for old files; numbers are drawn when they are needed"})

    def __post_init__(self):
        check_fields(self)
        check_range(self, "num_samples", 1)
        check_range(self, "dirichlet_prior", above=0)
        check_range(self, "buffer_size", 1)
        check_range(self, "sample_scaler")
        check_range(self, "kl_loss_weight")


class Sampler(nn.Module):
    """The learned spread (r,) and mixture weights (n,) in log space, and the last ones drawn, as a file holds them."""

    def __init__(self, r, n, **where):
        super().__init__()
        self.std_prior = nn.Parameter(torch.empty(r, **where))
        self.expert_weights_prior = nn.Parameter(torch.empty(n, **where))
        self.register_buffer("gaussian_var_prior", torch.empty(r, r, **where))
        self.register_buffer("expert_weights", torch.empty(n, **where))
        self.drawn = None  # the random numbers behind the last draw: (r,) and (n,)

    def reset(self):
        self.std_prior.uniform_()
        self.expert_weights_prior.uniform_()
        self.gaussian_var_prior.copy_(torch.eye(len(self.std_prior)))
        self.expert_weights.fill_(1 / len(self.expert_weights))

    def draw(self):
        """New variances (r,) and mixture weights (n,)."""
        std, prior = self.std_prior, self.expert_weights_prior
        r = len(std)
        # The diagonal of a Wishart draw with r degrees of freedom, and the normal numbers of a logistic one.
        self.drawn = torch.randn(r, r, device=std.device).square().sum(0), torch.randn(len(prior), device=std.device)
        variance, weights = self.variance(), self.weights()
        with torch.no_grad():
            self.gaussian_var_prior.copy_(variance.diag())
            self.expert_weights.copy_(weights)
        return variance, weights

    def variance(self):
        """That of the last draw, as a function of std_prior."""
        if self.drawn is None:
            return _exact(self.gaussian_var_prior.diag())
        return ((2 * _exact(self.std_prior)).exp() * self.drawn[0]).clamp(min=SMALLEST["variance"])

    def weights(self):
        """Those of the last draw, as a function of expert_weights_prior: softmax of the normal near a Dirichlet."""
        if self.drawn is None:
            return _exact(self.expert_weights)
        log_alpha = _exact(self.expert_weights_prior)
        n, inverse = len(log_alpha), (-log_alpha).exp()
        spread = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp(min=SMALLEST["spread"]) + SMALLEST["spread"]
        return torch.softmax(log_alpha - log_alpha.mean() + spread.sqrt() * self.drawn[1], dim=-1)


class Monteclora(Lora):
    """LoRA; in training A + noise, where noise ~ scaler · Σₖ wₖ N(0, diag(v)), with v and w drawn at each forward.

    That sum of n Gaussians is one with the standard deviation ‖w‖·√v, so one is drawn. Upstream draws all n, ahead.
    """

    kinds = ("linear",)
    title = "MonteCLoRA"

    lora_monteclora_sampler = Mod()

    def build(self, c, where):
        super().build(c, where)
        self.lora_monteclora_sampler = Sampler(self.r, c.monteclora_config.num_samples, **where)

    def reset(self, c):
        super().reset(c)
        self.lora_monteclora_sampler.reset()

    def low_rank(self):
        f = super().low_rank()
        if self.training and f is not None:
            variance, weights = self.lora_monteclora_sampler.draw()
            std = variance.sqrt() * (weights.norm() * self.config.monteclora_config.sample_scaler)
            noise = torch.randn(self.r, f.A.shape[1], device=f.A.device) * std[:, None]
            f.A = torch.cat([f.A[: self.r] + noise.to(f.A.dtype), f.A[self.r :]])  # a subtracted start stays as it is
        return f

    def penalty(self):
        """The divergence of what is drawn from its priors, and the concentration of the weights if the config says so.

        Upstream has the sign of one term wrong, and overflows for many samples; this is the Dirichlet's divergence.
        """
        c, sampler = self.config.monteclora_config, self.lora_monteclora_sampler
        r, n = self.r, c.num_samples
        log_std, alpha = _exact(sampler.std_prior), _exact(sampler.expert_weights_prior).exp()
        prior = torch.full_like(alpha, c.dirichlet_prior)
        dirichlet = torch.distributions.kl_divergence(*map(torch.distributions.Dirichlet, (alpha, prior)))
        wishart = 0.5 * r * ((2 * log_std).exp() - 2 * log_std - 1).sum()
        variance = sampler.variance()
        gaussians = 0.5 * n * (variance - variance.log() - 1).sum()
        total = c.kl_loss_weight * (dirichlet + wishart + gaussians)
        return total + sampler.weights().square().sum() if c.use_entropy else total


def _exact(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))
