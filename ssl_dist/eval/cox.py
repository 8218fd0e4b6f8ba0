"""Survival: Cox's partial likelihood, and a straight model of it.

S slides   D width   E events
"""

import numpy as np
import torch
from torch import Tensor

STEPS = 100         # of L-BFGS, at most


def loss(risk_S: Tensor, time_S: Tensor, event_S: Tensor) -> Tensor:
    """The negative logarithm of the partial likelihood, an event; equal times by Efron. Without an event it is 0."""
    time_E, risk_E = time_S[event_S], risk_S[event_S]
    if not len(time_E):
        return risk_S.sum() * 0
    at_risk_ES = (time_S >= time_E[:, None]).to(risk_S.dtype)
    tied_ES = ((time_S == time_E[:, None]) & event_S).to(risk_S.dtype)
    # Of d events at one time the first sees all of them at risk, the second all but one in d of each, and so on.
    tied_EE = time_E == time_E[:, None]
    before_E = tied_EE.tril(-1).sum(dim=1).to(risk_S.dtype) / tied_EE.sum(dim=1)
    counts_ES = at_risk_ES - before_E[:, None] * tied_ES
    return ((risk_S + counts_ES.log()).logsumexp(dim=1) - risk_E).mean()


def fitted(mean_SD: np.ndarray, time_S: np.ndarray, event_S: np.ndarray, strength: float) -> np.ndarray:
    """Weights (D) of a straight model of scaled vectors: as of scikit-learn's logistic regression, `strength` is what
    the likelihood of all events counts beside half the square of the weights."""
    known_SD, times_S, events_S = (torch.from_numpy(np.ascontiguousarray(each)) for each in (mean_SD, time_S, event_S))
    weights_D = torch.zeros(mean_SD.shape[1], dtype=known_SD.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_D], max_iter=STEPS, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        found = strength * events_S.sum() * loss(known_SD @ weights_D, times_S, events_S) + weights_D @ weights_D / 2
        found.backward()
        return found

    optimizer.step(step)        # type: ignore[arg-type]
    return weights_D.detach().numpy()
