"""What a machine lacks is one sentence with what to do, before a run and in `python -m alignment.doctor`."""

import platform
import sys
import types
from pathlib import Path

import pytest
import torch

from alignment import doctor
from alignment.config import gpu, preflight
from alignment.config.compose import load
from alignment.config.preflight import check_machine
from alignment.config.schema import Dtype
from alignment.errors import UserError
from alignment.policy.load import resolve_dtype
from tests.helpers.endings import refusal_of

SECTIONS = ("Software", "Processor", "GPU", "Storage", "Network", "Environment")


@pytest.fixture
def ready(monkeypatch):
    """A machine that lacks nothing, whatever this one is: torch sees an H100, and no network is asked."""
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda *a: "H100",
        "get_device_capability": lambda *a: (9, 0),
        "get_device_properties": lambda *a: types.SimpleNamespace(total_memory=80 * 2**30),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90", "sm_120"],
        "mem_get_info": lambda *a: (70 * 2**30, 80 * 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "_bitsandbytes_has_cuda", lambda: True)
    for module in (doctor, preflight):
        monkeypatch.setattr(module, "compiler_problem", lambda: None)
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "login_problem", lambda: "")
    return monkeypatch


def printed(capsys, status=0) -> str:
    assert doctor.main([]) == status
    return capsys.readouterr().out


# The command


def test_a_ready_machine_is_shown_with_what_is_fine(ready, capsys):
    out = printed(capsys)
    assert [line for line in out.splitlines() if line in SECTIONS] == list(SECTIONS)
    for part in (
        "torch ",
        "built for CUDA 13.0",
        "H100, compute capability 9.0, 80.0 GiB",
        "70.0 GiB free",
        "bfloat16",
    ):
        assert part in out
    assert "not found out" not in out
    assert out.endswith("Nothing is lacking for runs on this machine's GPU.\n")


def test_a_machine_without_a_gpu_lacks_nothing(ready, capsys):
    ready.setattr(torch.cuda, "is_available", lambda: False)
    ready.setattr(torch.version, "cuda", None)
    out = printed(capsys)
    assert "none (this torch is built for CPUs alone" in out
    assert out.endswith("Nothing is lacking for runs on this machine's CPU.\n")


def test_nothing_private_is_printed(ready, capsys, tmp_path):
    """Neither tokens nor who and where: also not in folders and in what a library says."""
    home = tmp_path / "homes" / "marlene"
    (home / "work").mkdir(parents=True)
    ready.setattr(Path, "home", lambda: home)
    ready.setattr(platform, "node", lambda: "node17")
    ready.setattr(doctor.getpass, "getuser", lambda: "marlene")
    ready.setenv("HF_TOKEN", "hf_verysecret")
    ready.setenv("WANDB_API_KEY", "0123456789" * 4)
    ready.setenv("ALIGNMENT_CACHE", str(home / "cache"))
    ready.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path / "scratch" / "marlene" / "node17" / "hub"))
    ready.setattr(doctor, "login_problem", lambda: "the login of marlene at https://wandb.node17 is not valid")
    ready.setattr(torch.cuda, "get_device_name", lambda *a: (_ for _ in ()).throw(RuntimeError("marlene on node17")))
    ready.setattr(doctor, "gpu_problems", lambda: [])
    ready.chdir(home / "work")
    out = printed(capsys)
    for secret in ("hf_verysecret", "0123456789" * 4, "marlene", "node17"):
        assert secret not in out
    for part in ("~/cache", "~/work", "/USER/HOST/hub", "not found out  RuntimeError: USER on HOST", "logged in"):
        assert part in out


def test_a_dead_hub_is_said_in_seconds(ready, capsys):
    asked = []

    class Dead:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("no route to host")

    ready.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    ready.setattr(doctor, "get_session", Dead)
    assert "hub  cannot be reached (OSError): only what is in its cache" in printed(capsys)
    assert asked == [5]


def test_what_is_lacking_stands_at_the_end(ready, capsys, tmp_path):
    ready.setattr(torch.cuda, "mem_get_info", lambda *a: (2**28, 80 * 2**30))
    ready.setattr(gpu, "_bitsandbytes_has_cuda", lambda: False)
    ready.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**28))
    lacking = printed(capsys, status=1).partition("This machine lacks\n")[2].splitlines()
    assert [line[:30] for line in lacking[:2]] == ["  - free memory on H100 (0.2 o", "  - bitsandbytes' library for "]
    assert all(line.startswith("  - disk space (0.2 GiB are free for ") for line in lacking[2:])
    assert len(lacking) == 5


def test_a_word_too_many_is_one_sentence():
    assert refusal_of(doctor.main, ["--jsno"]).startswith("Error: Unrecognized arguments: --jsno")


# Before a run


def refusal(*overrides) -> str:
    with pytest.raises(UserError) as caught:
        check_machine(load("recipe=quickstart", *overrides))
    return str(caught.value)


def test_a_ready_machine_is_not_refused(ready):
    check_machine(load("recipe=quickstart", "device=cuda", "quantization=nf4"))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_run_on_a_gpu_is_refused_for_what_it_lacks(ready, device):
    """All of it in one sentence, and none of it for a run on the CPU."""
    ready.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100", "compute_120"])
    ready.setattr(torch.cuda, "mem_get_info", lambda *a: (2**28, 80 * 2**30))
    ready.setattr(gpu, "_bitsandbytes_has_cuda", lambda: False)
    ready.setattr(preflight, "compiler_problem", lambda: "a C compiler, which Triton needs (install gcc)")
    said = refusal(f"device={device}", "quantization=nf4")
    for part in (
        "a torch with kernels for H100 (compute capability 9.0; this torch has them for sm_100, compute_120: install",
        "free memory on H100 (0.2 of 80.0 GiB are free: end what uses it",
        "bitsandbytes' library for CUDA 13.0 (",
        "a C compiler, which Triton needs",
    ):
        assert part in said
    assert "\n" not in said
    check_machine(load("recipe=quickstart", "device=cpu"))


def test_only_sft_needs_a_compiler(ready):
    """TRL's head has no other way; our own kernels have one."""
    ready.setattr(preflight, "compiler_problem", lambda: "a C compiler, which Triton needs (install gcc)")
    assert "a C compiler" in refusal()
    check_machine(load("recipe=quickstart", "sft=none"))


def test_a_tracker_that_is_not_installed_is_named_with_what_helps(ready):
    """The quickstart tracks its runs, too, so it is offered only where more is missing."""
    ready.setitem(preflight.TRACKER_PACKAGES, "trackio", ("nowhere", "to_be_found"))
    lacking = "nowhere, to_be_found for tracking.to=trackio (pip install 'alignment[trackio]')"
    assert refusal("tracking=trackio") == f"This run lacks {lacking}: provide that, or set tracking=none."
    ready.setattr(preflight, "compiler_problem", lambda: "a C compiler (install gcc)")
    assert refusal("tracking=trackio").startswith(f"This run lacks a C compiler (install gcc), and {lacking}: provide ")
    with pytest.raises(UserError, match=r"^tracking\.to names no tracker: set tracking=none"):
        load("recipe=quickstart", "tracking=wandb", "tracking.to=[]")


def test_a_gpu_that_takes_no_work_is_named(ready):
    def busy(*args):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be")

    ready.setattr(torch.cuda, "mem_get_info", busy)
    said = refusal()
    assert "a GPU that takes work (H100 says: CUDA error: all CUDA-capable devices are busy or unavailable; end" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("built", "driver", "visible", "expected"),
    [
        (None, "580.1", None, "this torch is built for CPUs alone: install one built for CUDA"),
        ("13.0", "580.1", "", "CUDA_VISIBLE_DEVICES hides every GPU"),
        ("13.0", "550.54", None, "the driver runs CUDA 12.4 and this torch is built for 13.0: update the driver, or"),
        ("12.6", None, None, "no NVIDIA driver is loaded"),
        ("12.6", "550.54", "0", "torch sees none: see what nvidia-smi says"),
    ],
)
def test_why_torch_sees_no_gpu(built, driver, visible, expected, monkeypatch, tmp_path, caplog):
    """In the sentence that refuses `device=cuda`, and as a warning where a run goes on without the machine's GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040 if driver else 0, raising=False)
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path / "version")
    if driver:
        (tmp_path / "version").write_text(
            f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release\n"
        )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.driver_version() == driver
    assert f"a CUDA GPU ({expected}" in refusal("device=cuda")
    check_machine(load("recipe=quickstart"))
    assert ("This run is on the CPU, though the machine has a GPU: " + expected in caplog.text) == (driver is not None)


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_75", "sm_80"], (8, 6), True),
        (["sm_75", "sm_80"], (7, 0), False),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_75", "compute_80"], (9, 0), True),
        (["sm_90a", "sm_120"], (12, 1), True),
        ([], (12, 1), True),
    ],
)
def test_machine_code_runs_within_a_generation_and_portable_code_on_later_ones(built_for, capability, runs):
    assert gpu._runs_on(built_for, capability) == runs


@pytest.mark.parametrize(("capability", "auto"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_is_no_dtype_that_the_gpu_emulates(ready, capability, auto):
    """A T4 says that it supports bfloat16, but it computes it in pieces."""
    device = torch.device("cuda", 0)
    ready.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    assert resolve_dtype(Dtype.auto, device) is auto
    whole = torch.float32 if auto is torch.float16 else auto
    assert resolve_dtype(Dtype.auto, device, whole=True) is whole, "float16 rounds updates of the weights away"
    assert resolve_dtype(Dtype.bfloat16, device) is torch.bfloat16, "whoever asks for it gets it"


def test_a_bfloat16_that_is_emulated_is_said(ready, caplog):
    for capability in ((8, 0), (7, 5)):
        ready.setattr(torch.cuda, "get_device_capability", lambda *a, found=capability: found)
        check_machine(load("recipe=quickstart", "model.dtype=bfloat16"))
        check_machine(load("recipe=quickstart", "model.dtype=auto"))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["This GPU is older than Ampere and emulates bfloat16: model.dtype=float16 is faster."]


def test_float16_is_for_adapters():
    with pytest.raises(
        UserError, match=r"^model\.dtype=float16 rounds updates of the model's own weights away: choose"
    ):
        load("recipe=quickstart", "model.dtype=float16", "adapter=none")


def test_triton_needs_a_compiler_and_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.compiler_problem() is None, "without Triton nothing is compiled"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name, scheme: str(tmp_path / scheme))
    monkeypatch.setattr(gpu.sysconfig, "get_default_scheme", lambda: "posix_local")
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.compiler_problem().startswith("a C compiler, which Triton needs (install gcc")
    monkeypatch.setenv("CC", "/opt/cc")
    assert gpu.compiler_problem().startswith("Python's headers, which Triton needs")
    (tmp_path / "posix_prefix").mkdir()
    (tmp_path / "posix_prefix" / "Python.h").touch()
    assert gpu.compiler_problem() is None
    (tmp_path / "posix_prefix" / "Python.h").unlink()
    monkeypatch.setenv("CPATH", "/opt/include")
    assert gpu.compiler_problem() is None, "the headers may be there"


def test_a_library_without_cuda_is_found(monkeypatch):
    """What is installed here, and one that does not load."""
    assert gpu.bitsandbytes_problem(on_gpu=False) is None
    if not torch.cuda.is_available():
        assert gpu.bitsandbytes_problem(on_gpu=True).startswith("bitsandbytes' library for CUDA ")
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    assert not gpu._bitsandbytes_has_cuda()
