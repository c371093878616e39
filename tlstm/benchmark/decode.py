"""Generating tokens: the library's `generate`, a plain loop over `torch.nn.LSTM`, and its step in a CUDA graph.

All decode greedily from random weights. What they wrote is read once more in float64: each token must be the best one
there but for a difference that rounding explains, so that ties of low precision are no error, and wrong states are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tlstm.benchmark.problem import Problem
from tlstm.benchmark.providers import Built, Provider
from tlstm.benchmark.verification import FACTOR, UNITS, Verdict, WrongResultError
from tlstm.benchmark.workload import Workload

LIVELY = 4.0


class Decoder(nn.Module):
    """An embedding, an LSTM and a head, from torch's own modules."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.embedding = nn.Embedding(w.vocab, w.I)
        self.lstm = nn.LSTM(w.I, w.H, w.layers, batch_first=True)
        self.head = nn.Linear(w.H, w.vocab)

    def forward(
        self,
        ids: Tensor,  # (B, N) int64
        state: tuple[Tensor, Tensor] | None = None,  # h, c (L, B, H)
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (B, N, V) and the state after the last token."""
        y, state = self.lstm(self.embedding(ids), state)
        return self.head(y), state


class DecodeProblem(Problem):
    """Random weights and, as input sets, prompts (B, 1) of one token for each stream."""

    def __init__(self, workload: Workload, dtype: str, device: str, seed: int = 0, input_sets: int = 2) -> None:
        self.workload, self.mode, self.dtype_name, self.device = workload, "decode", dtype, torch.device(device)
        self.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = Decoder(workload).requires_grad_(False).to(self.dtype).to(self.device)
            with torch.no_grad():  # livelier than a fresh model, which writes the same few tokens whatever its state
                for parameter in self.decoder.lstm.parameters():
                    parameter.mul_(LIVELY)
                self.decoder.head.bias.zero_()
            prompts = [torch.randint(workload.vocab, (workload.B, 1)) for _ in range(input_sets)]
        self.xs = [prompt.to(self.device) for prompt in prompts]
        self.module, self.resets = self.decoder.lstm, None


class DecodeTruth:
    """Judges the tokens that a provider wrote."""

    def __init__(self, problem: DecodeProblem) -> None:
        self.problem = problem
        self.exact = copy.deepcopy(problem.decoder).double()

    def check(self, built: Built) -> Verdict:
        """Run the provider on the first prompt and read its tokens in float64.

        Raises:
            WrongResultError: wrong shape, ids outside the vocabulary, or a token that was not the best one.
        """
        w, prompt = self.problem.workload, self.problem.xs[0]
        tokens = built.run(prompt)
        if tokens.shape != (w.B, w.T):
            raise WrongResultError(f"tokens: expected shape {(w.B, w.T)}; got {tuple(tokens.shape)}")
        if not bool(((tokens >= 0) & (tokens < w.vocab)).all()):
            raise WrongResultError(f"tokens: expected ids of 0..{w.vocab - 1}; got {tokens.min()}..{tokens.max()}")
        read = torch.cat((prompt, tokens[:, :-1]), 1)
        with torch.no_grad(), self.problem.precision():
            logits = self.exact(read)[0]
            error = float((self.problem.decoder(read)[0].double() - logits).abs().max())
        eps = torch.finfo(torch.float32).eps
        # Two logits are compared, each of them off by as much as torch's own are in that dtype.
        allowed = 2 * (FACTOR * error + UNITS * eps * float(logits.abs().max()))
        behind = float((logits.amax(-1) - logits.gather(-1, tokens[..., None]).squeeze(-1)).max())
        if not behind <= allowed:
            raise WrongResultError(f"tokens: one is {behind:.3g} behind the best in float64, {allowed:.3g} granted")
        return Verdict(behind / allowed, "tokens")


def _tlstm(decoder: str) -> Callable[[Problem], Built]:
    """`generate` with the decoder of that name; with "auto" it is not named, as earlier versions have no choice."""
    options: dict[str, Any] = {} if decoder == "auto" else {"decoder": decoder}

    def build(problem: Problem) -> Built:
        from tlstm.config import LSTMConfig
        from tlstm.models.causal_lm import LSTMForCausalLM

        assert isinstance(problem, DecodeProblem)
        w, weights = problem.workload, problem.decoder
        config = LSTMConfig(vocab_size=w.vocab, hidden_size=w.H, num_layers=w.layers, embedding_size=w.I)
        model = LSTMForCausalLM(config).to(problem.dtype).to(problem.device).eval()
        with torch.no_grad():
            model.model.embedding.weight.copy_(weights.embedding.weight)
            model.lm_head.load_state_dict(weights.head.state_dict())
            for n, layer in enumerate(model.model.layers):
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    getattr(layer, f"{kind}_l0").copy_(getattr(weights.lstm, f"{kind}_l{n}"))

        def generate(prompt: Tensor, **more: Any) -> Any:
            return model.generate(prompt, do_sample=False, max_new_tokens=w.T, **options, **more)

        def plan() -> str:
            return str(generate(problem.xs[0], return_dict_in_generate=True).decoder)

        return Built(lambda prompt: generate(prompt)[:, 1:], {}, plan=plan)

    return build


def _torch(problem: Problem) -> Built:
    assert isinstance(problem, DecodeProblem)
    decoder, T = problem.decoder, problem.workload.T

    @torch.no_grad()
    def run(prompt: Tensor) -> Tensor:
        token, state, tokens = prompt, None, []
        for _ in range(T):
            logits, state = decoder(token, state)
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        return torch.cat(tokens, 1)

    return Built(run, {})


def _torch_graph(problem: Problem) -> Built:
    assert isinstance(problem, DecodeProblem)
    decoder, w, device = problem.decoder, problem.workload, problem.device
    token, tokens, position = (
        torch.zeros(shape, dtype=torch.long, device=device) for shape in ((w.B, 1), (w.B, w.T), (1,))
    )
    h, c = (torch.zeros(w.layers, w.B, w.H, dtype=problem.dtype, device=device) for _ in range(2))

    def step() -> None:
        logits, (h_n, c_n) = decoder(token, (h, c))
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        h.copy_(h_n)
        c.copy_(c_n)
        tokens.index_copy_(1, position, token)
        position.add_(1)

    def start(prompt: Tensor) -> None:
        token.copy_(prompt)
        for tensor in (h, c, position):
            tensor.zero_()

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        start(problem.xs[0])
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        step()

    def run(prompt: Tensor) -> Tensor:
        start(prompt)
        for _ in range(w.T):
            graph.replay()
        return tokens.clone()

    return Built(run, {}, keep_alive=[graph])


def _only_on(kind: str) -> Callable[[Problem], str | None]:
    return lambda problem: None if problem.device.type == kind else f"it runs on {kind} only"


def decode_registry() -> dict[str, Provider]:
    """The providers of decode mode: `generate` with the decoder that it chooses and with each by name, and torch's."""
    providers = (
        Provider("tlstm", "LSTMForCausalLM.generate", lambda p: None, _tlstm("auto")),
        Provider("tlstm:kernel", "the loop in one GPU kernel", _only_on("cuda"), _tlstm("kernel")),
        Provider("tlstm:graph", "a step in a CUDA graph", _only_on("cuda"), _tlstm("graph")),
        Provider("tlstm:lean", "a lean step on a CPU", _only_on("cpu"), _tlstm("lean")),
        Provider("tlstm:loop", "a call of the model for every token", lambda p: None, _tlstm("loop")),
        Provider("torch", "a loop over torch.nn.LSTM", lambda p: None, _torch),
        Provider("torch-graph", "that loop's step in a CUDA graph", _only_on("cuda"), _torch_graph),
    )
    return {p.name: p for p in providers}
