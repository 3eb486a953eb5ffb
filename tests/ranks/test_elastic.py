"""A job that ``torchrun`` restarts when a rank has died in the middle of a pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import limit
from torch import nn

from lightning_bn import recalibrate

_SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from lightning_bn import recalibrate

folder, restart = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
# A meeting of its own for each start: gloo may find the addresses of processes that are gone in torchrun's store.
dist.init_process_group("gloo", init_method=f"file://{folder.resolve()}/meeting{restart}", rank=rank, world_size=2)
layer = nn.BatchNorm1d(3)
data = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
before = [buffer.clone() for buffer in layer.buffers()]


def forward(model, batch):
    if restart == 0 and rank == 1:
        os._exit(3)
    return model(batch)


try:
    recalibrate(layer, data[rank::2].split(4), forward=forward, progress=False)
except Exception as error:
    kept = all(torch.equal(one, other) for one, other in zip(layer.buffers(), before))
    (folder / f"failed{restart}.json").write_text(json.dumps([str(error), kept]))
    raise
(folder / f"done{restart}_{rank}.json").write_text(json.dumps([each.tolist() for each in list(layer.buffers())[:2]]))
dist.barrier()
os._exit(0)  # torch 2.6 may wait forever as it destroys the group, and 2.13 abort as it does not
"""


@pytest.mark.timeout(200)
def test_a_restarted_job_recalibrates(tmp_path: Path) -> None:
    """A rank exits in its first batch. The survivor's error says that the statistics are the old ones, and they are;
    the processes that torchrun starts in their place end with the statistics of all data."""
    (tmp_path / "job.py").write_text(_SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, *launch, str(tmp_path / "job.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit(150), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if (tmp_path / "failed0.json").exists():  # torchrun may end the survivor before its collective fails
        error, kept = json.loads((tmp_path / "failed0.json").read_text())
        assert "The statistics of all ranks are as before." in error
        assert kept
    layer = nn.BatchNorm1d(3)
    data = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    recalibrate(layer, [data], progress=False)
    for rank in range(2):
        mean, var = json.loads((tmp_path / f"done1_{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(mean), layer.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(var), layer.running_var, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("done0_*"))
