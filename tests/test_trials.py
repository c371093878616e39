"""When kernels are used that nobody asked for by name: after their trial on the GPU, which is remembered."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_models import causal_lm

from tlstm import trials
from tlstm.functional import dispatch, resolve_backend
from tlstm.generation import decoders
from tlstm.generation.config import GenerationConfig
from tlstm.trials import trial_refusal

pytest.importorskip("triton", reason="without triton there are no kernels to try")


class FakeGPU:
    """A GPU as `trials` sees it, and the trials held on it."""

    def __init__(self) -> None:
        self.held: list[tuple[str, int | None, str]] = []
        self.reason: str | None = None
        self.capturing = False
        self.properties = SimpleNamespace(name="GPU", major=9, minor=0, multi_processor_count=132)

    def hold(self, kind: str, index: int | None, dtype: str) -> str | None:
        self.held.append((kind, index, dtype))
        return self.reason


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    fake = FakeGPU()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trials, "_verdicts", {})
    monkeypatch.setattr(trials, "_tried", fake.hold)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: fake.properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return fake


def new_process() -> None:
    trials._verdicts.clear()


def test_auto_means_the_kernels_once_they_have_passed(gpu, caplog, monkeypatch):
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert gpu.held == [("layer", 0, "bfloat16")]
    assert "trying the layer kernels in bfloat16 on GPU" in caplog.text
    for device in ("cuda", "cuda:0"):
        assert resolve_backend("auto", device, torch.bfloat16) == "triton"
    assert len(gpu.held) == 1
    with monkeypatch.context() as patch:  # no later call looks at driver and packages
        patch.setattr(dispatch, "why_unavailable", None)
        assert resolve_backend("auto", "cuda:0", torch.bfloat16) == "triton"
    new_process()
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert len(gpu.held) == 1  # remembered
    resolve_backend("auto", "cuda", torch.float16)
    assert len(gpu.held) == 2  # another dtype


def test_auto_means_torch_where_they_have_failed(gpu):
    gpu.reason = "y is off by 1"
    with pytest.warns(UserWarning, match=r"layer kernels failed .* on GPU: y is off by 1\. torch's own LSTM"):
        assert resolve_backend("auto", "cuda") == "native"
    assert resolve_backend("auto", "cuda") == "native"
    assert resolve_backend("triton", "cuda") == "triton"  # by name, all the same
    assert len(gpu.held) == 1
    assert not trials.cache_folder().exists()
    new_process()
    gpu.reason = None
    assert resolve_backend("auto", "cuda") == "triton"


@pytest.mark.parametrize("change", ["multiprocessors", "torch", "kernels", "damaged"])
def test_another_gpu_or_version_has_a_trial_of_its_own(gpu, monkeypatch, change):
    trial_refusal("layer", 0, "float32")
    new_process()
    if change == "multiprocessors":
        gpu.properties.multi_processor_count = 114
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "99")
    elif change == "kernels":
        monkeypatch.setattr(trials, "_source_digest", lambda: "other")
    else:
        (path,) = trials.cache_folder().iterdir()
        path.write_text(path.read_text()[:-9])
    assert trial_refusal("layer", 0, "float32") is None
    assert len(gpu.held) == 2
    assert all(json.loads(path.read_text())["kind"] == "layer" for path in trials.cache_folder().iterdir())


def test_a_place_that_cannot_be_written_costs_a_trial_in_every_process(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert trial_refusal("layer", 0, "float32") is None
        new_process()
    assert len(gpu.held) == 2


def test_compiled_kernels_are_known_to_later_processes_and_other_gpus_have_their_own(gpu):
    assert not trials.has_compiled("a", 0)
    trials.note_compiled("a", 0)
    assert trials.has_compiled("a", 0)
    assert not trials.has_compiled("b", 0)
    gpu.properties.name = "other"
    assert not trials.has_compiled("a", 0)


def test_no_trial_while_a_graph_is_recorded(gpu):
    gpu.capturing = True
    assert "CUDA graph" in trial_refusal("layer", 0, "float32")
    assert resolve_backend("auto", "cuda") == "native"
    gpu.capturing = False
    assert resolve_backend("auto", "cuda") == "triton"
    gpu.capturing = True
    assert resolve_backend("auto", "cuda") == "triton"


def test_threads_share_one_trial(gpu):
    threads = [threading.Thread(target=trial_refusal, args=("layer", 0, "float32")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.held) == 1


def test_what_cannot_run_has_no_trial(gpu, monkeypatch):
    assert resolve_backend("auto", "cuda", torch.float64) == "native"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert resolve_backend("auto", "cuda") == "native"
    assert resolve_backend("auto", "cpu") == "native"
    assert gpu.held == []


@pytest.mark.parametrize("kind", ["layer", "decode"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_trial_has_the_modes_that_it_needs(monkeypatch, kind, mode):
    def hold(device, dtype):
        assert (device, dtype) == (torch.device("cuda", 3), torch.float16)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled() == (kind == "layer")
        assert not torch.is_autocast_enabled("cuda")
        return "seen"

    monkeypatch.setattr(f"tlstm_kernels.{trials._TRIALS[kind]}.{kind}_trial", hold)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    with mode(), torch.autocast("cpu"):
        assert trials._tried(kind, 3, "float16") == "seen"


def test_a_compiled_function_has_the_verdict_as_a_constant(gpu, monkeypatch):
    """The trial is held while the graph is made, not in it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or the compiler looks at the GPU that is not here
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def scaled(x):
        return x * (2 if trial_refusal("layer", 0, "float32") is None else 3)

    assert scaled(torch.ones(3)).tolist() == [2, 2, 2]
    assert gpu.held == [("layer", 0, "float32")]


def test_generation_takes_the_kernel_once_it_has_passed(gpu, monkeypatch):
    model = causal_lm()
    monkeypatch.setattr(decoders, "_check_on_gpu", lambda model: None)
    monkeypatch.setattr(decoders.KernelRows, "refusal", staticmethod(lambda model, config: None))
    monkeypatch.setattr(decoders.KernelRows, "__init__", lambda self, *args, **options: None)
    monkeypatch.setattr(decoders, "plan_for", lambda model, config, places: None)
    monkeypatch.setattr(decoders, "kernel_name", lambda plan, config: "kernel")
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    request = (model, GenerationConfig(), 1, 10**6, None, None)
    assert isinstance(decoders.kernel_rows(*request, by_name=False), decoders.KernelRows)
    assert gpu.held == [("decode", 0, "float32")]
    few = (model, GenerationConfig(), 1, 100, None, None)
    with pytest.raises(decoders.DecoderRefusedError, match="not been compiled on this machine, which takes longer"):
        decoders.kernel_rows(*few, by_name=False)
    assert isinstance(decoders.kernel_rows(*few, by_name=True), decoders.KernelRows)
    trials.note_compiled("kernel", 0)
    assert isinstance(decoders.kernel_rows(*few, by_name=False), decoders.KernelRows)
    new_process()
    gpu.properties.name, gpu.reason = "other", "h of the last layer is off by 1"
    with (
        pytest.warns(UserWarning, match="decode kernels failed"),
        pytest.raises(decoders.DecoderRefusedError, match="failed their trial on other: h of the last layer"),
    ):
        decoders.kernel_rows(*request, by_name=False)
    assert isinstance(decoders.kernel_rows(*request, by_name=True), decoders.KernelRows)
