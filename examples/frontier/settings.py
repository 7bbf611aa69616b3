"""How much of everything: what the committed figure was made with, and a small version for the test."""

from __future__ import annotations

from dataclasses import dataclass, field

SFT, DPO, RL, RL_TRUE = "Preferred-FT", "DPO", "RL, learned reward", "RL, true reward"
METHODS = (SFT, DPO, RL, RL_TRUE)
OF_BETA = (DPO, RL, RL_TRUE)


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    betas: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.1)
    looks: int = 3  # evaluations along each training
    pairs: int = 4096
    held_out: int = 512  # preferences for the reward model's early stopping, beside `pairs`
    reference: dict = field(default_factory=lambda: {"steps": 900, "batch": 64, "rate": 4e-3, "seed": 0})
    reward_model: dict = field(default_factory=lambda: {"steps": 192, "batch": 64, "rate": 8e-3})
    preferred: dict = field(default_factory=lambda: {"steps": 128, "batch": 32, "rate": 1e-3})
    dpo: dict = field(default_factory=lambda: {"steps": 256, "batch": 32, "rate": 3e-4})
    rl: dict = field(default_factory=lambda: {"steps": 120, "batch": 128, "group": 8, "epochs": 1, "rate": 5e-4})
    prompts: int = 1024  # of each evaluation
    ceiling_prompts: int = 24
    ceiling_samples: int = 8192

    def of(self, method: str) -> dict:
        return {SFT: self.preferred, DPO: self.dpo, RL: self.rl, RL_TRUE: self.rl}[method]


FULL = Settings()
QUICK = Settings(
    seeds=(0,),
    betas=(1.0, 0.25),
    looks=2,
    pairs=768,
    held_out=128,
    reference={"steps": 250, "batch": 32, "rate": 3e-3, "seed": 0},
    reward_model={"steps": 48, "batch": 32, "rate": 1e-3},
    preferred={"steps": 24, "batch": 32, "rate": 1e-3},
    dpo={"steps": 48, "batch": 32, "rate": 1e-3},
    rl={"steps": 24, "batch": 64, "group": 8, "epochs": 1, "rate": 1e-3},
    prompts=256,
    ceiling_prompts=8,
    ceiling_samples=512,
)
