"""Small networks for the time to an event: a hazard for each interval, and a deep Cox model.

Both are averages of several networks, each trained with its own start and its own part of the patients kept back to
decide when to stop, so that no validation set has to be given.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from sksurv.linear_model.coxph import BreslowEstimator
from torch import nn

from biomodel.errors import InputError
from survival.curves import steps
from survival.hazard import Head, curve_from_hazards, interval_edges

__all__ = ["DeepCox", "DeepHazard"]


class _Networks(Head):
    """What the networks share: layers, training with early stopping, averaging.

    Parameters
    ----------
    hidden : tuple of int
        Widths of the layers.
    dropout, decay, rate : float
        Share of units dropped in training; weight decay of AdamW; its learning rate.
    members : int
        Networks that are averaged.
    epochs, patience, batch : int
        Longest training; epochs without improvement on the patients kept back before it stops; patients in a step.
    kept : float
        Share of the patients kept back to decide when to stop.
    seed : int
    """

    def __init__(self, hidden: tuple[int, ...] = (64, 64), dropout: float = 0.3, decay: float = 0.01,
                 rate: float = 0.003, members: int = 5, epochs: int = 200, patience: int = 15, batch: int = 256,
                 kept: float = 0.2, seed: int = 0):  # fmt: skip
        self.hidden, self.dropout, self.decay, self.rate = hidden, dropout, decay, rate
        self.members, self.epochs, self.patience, self.batch = members, epochs, patience, batch
        self.kept, self.seed = kept, seed

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.scaler_ = StandardScaler().fit(x)
        z = torch.tensor(self.scaler_.transform(x), dtype=torch.float32)
        target = self._target(y)
        with torch.random.fork_rng(devices=[]):
            self.networks_ = [self._train(z, target, y["event"], self.seed + k) for k in range(self.members)]
        self._finish(x, y)

    def _train(self, z: torch.Tensor, target: torch.Tensor, event: np.ndarray, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        order = np.random.default_rng(seed).permutation(len(z))
        # As many events for each patient kept back as for each one trained on.
        order = np.concatenate((order[event[order]], order[~event[order]]))
        back = np.zeros(len(z), bool)
        back[order[:: max(2, round(1 / self.kept))]] = True
        train, held = torch.tensor(np.flatnonzero(~back)), torch.tensor(np.flatnonzero(back))
        if not event[back].any() or not event[~back].any():
            raise InputError(f"{type(self).__name__}.fit: too few events to keep some back; give more patients.")
        net = self._network(z.shape[1])
        optimiser = torch.optim.AdamW(net.parameters(), lr=self.rate, weight_decay=self.decay)
        best, state, since = np.inf, {}, 0
        for _ in range(self.epochs):
            net.train()
            for part in train[torch.randperm(len(train))].split(self.batch):
                optimiser.zero_grad()
                loss = self._loss(net(z[part]), target[part])
                loss.backward()
                optimiser.step()
            net.eval()
            with torch.no_grad():
                now = float(self._loss(net(z[held]), target[held]))
            if now < best:
                best, since, state = now, 0, {k: v.clone() for k, v in net.state_dict().items()}
            else:
                since += 1
                if since > self.patience:
                    break
        net.load_state_dict(state)
        return net

    def _network(self, columns: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in self.hidden:
            layers += [nn.Linear(columns, width), nn.SELU(), nn.Dropout(self.dropout)]
            columns = width
        return nn.Sequential(*layers, nn.Linear(columns, self._outputs()))

    def _raw(self, x: np.ndarray) -> np.ndarray:
        """Outputs (members, n, k)."""
        z = torch.tensor(self.scaler_.transform(x), dtype=torch.float32)
        with torch.no_grad():
            return np.stack([net(z).numpy().astype(float) for net in self.networks_])

    def _target(self, y: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def _outputs(self) -> int:
        raise NotImplementedError

    def _loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _finish(self, x: np.ndarray, y: np.ndarray) -> None:
        """What is left to be done once the networks are trained."""


class DeepHazard(_Networks):
    """A network that gives the hazard of each interval (Gensheimer and Narasimhan 2019, doi:10.7717/peerj.6257).

    Parameters
    ----------
    hidden, dropout, decay, rate, members, epochs, patience, batch, kept, seed
        As :class:`_Networks`: layers, their training, and how many networks are averaged.
    intervals : int
        Number of intervals, between quantiles of the times of events.
    """

    def __init__(self, hidden: tuple[int, ...] = (64, 64), dropout: float = 0.3, decay: float = 0.01,
                 rate: float = 0.003, members: int = 5, epochs: int = 200, patience: int = 15, batch: int = 256,
                 kept: float = 0.2, seed: int = 0, intervals: int = 20):  # fmt: skip
        super().__init__(hidden, dropout, decay, rate, members, epochs, patience, batch, kept, seed)
        self.intervals = intervals

    def _target(self, y: np.ndarray) -> torch.Tensor:
        """For each interval: part of it at risk (censored patients) and whether the event fell there, (n, 2, K)."""
        self.edges_ = interval_edges(y, self.intervals)
        share = np.clip((y["time"][:, None] - self.edges_[:-1]) / np.diff(self.edges_), 0, 1)
        event = (share > 0) & (y["time"][:, None] <= self.edges_[1:]) & y["event"][:, None]
        risk = np.where(event, 1.0, share)
        common = np.clip(event.sum(0) / np.maximum(risk.sum(0), 1.0), 1e-4, 1 - 1e-4)
        self.start_ = np.log(common / (1 - common))
        return torch.tensor(np.stack((risk, event), 1), dtype=torch.float32)

    def _network(self, columns: int) -> nn.Sequential:
        """Starts from the hazards of all patients together, so that little training cannot leave them far off."""
        net = super()._network(columns)
        with torch.no_grad():
            last = net[-1]
            assert isinstance(last, nn.Linear)
            last.bias.copy_(torch.tensor(self.start_))
        return net

    def _outputs(self) -> int:
        return len(self.edges_) - 1

    def _loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        each = nn.functional.binary_cross_entropy_with_logits(out, target[:, 1], target[:, 0], reduction="none")
        return each.sum(1).mean()

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        hazards = 1 / (1 + np.exp(-self._raw(x)))
        return np.mean([curve_from_hazards(h, self.edges_, times) for h in hazards], axis=0)


class DeepCox(_Networks):
    """Proportional hazards, the log hazard ratio a network (Katzman et al. 2018, doi:10.1186/s12874-018-0482-1).

    Parameters
    ----------
    hidden, dropout, decay, rate, members, epochs, patience, batch, kept, seed
        As :class:`_Networks`: layers, their training, and how many networks are averaged. The partial likelihood is
        that of the patients of a step (Breslow's treatment of ties).
    """

    def _target(self, y: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.column_stack((y["time"], y["event"])), dtype=torch.float32)

    def _outputs(self) -> int:
        return 1

    def _loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        order = torch.argsort(target[:, 0], descending=True, stable=True)
        risk, event, time = out[order, 0], target[order, 1], target[order, 0]
        total = torch.logcumsumexp(risk, 0)
        # Tied times share the risk set that ends with the last of them.
        last = torch.searchsorted(-time, -time, right=True) - 1
        return ((total[last] - risk) * event).sum() / event.sum().clamp(min=1)

    def _finish(self, x: np.ndarray, y: np.ndarray) -> None:
        self.baseline_ = BreslowEstimator().fit(self._risk(x), y["event"], y["time"]).cum_baseline_hazard_

    def _risk(self, x: np.ndarray) -> np.ndarray:
        return self._raw(x)[:, :, 0].mean(0)

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        return np.exp(-np.exp(self._risk(x))[:, None] * steps(self.baseline_.x, self.baseline_.y, times, 0.0))
