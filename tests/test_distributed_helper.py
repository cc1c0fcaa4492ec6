import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def _sum(rank: int, world_size: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    start += rank
    dist.all_reduce(start)
    return rank, start


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def _hang_or_die(rank: int, world_size: int, how: str) -> None:
    if rank == 1:
        os._exit(3) if how == "die" else time.sleep(600)
    time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_form_a_group_and_own_their_arguments(world_size: int) -> None:
    results = run_distributed(_sum, world_size, torch.ones(2))
    total = float(sum(1 + rank for rank in range(world_size)))
    assert [rank for rank, _ in results] == list(range(world_size))
    assert all(torch.equal(value, torch.full((2,), total)) for _, value in results)


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 of 2 failed.*_fail_on_one.*ValueError: the reason"
    ):
        run_distributed(_fail_on_one, 2)


@pytest.mark.parametrize(
    ("how", "timeout", "message"),
    [("hang", 3, r"ranks \[0, 1\] of 2 not done after 3 s"), ("die", 300, "rank 1 of 2 died")],
)
def test_hanging_and_dying_ranks_do_not_hang_the_test(how: str, timeout: int, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_distributed(_hang_or_die, 2, how, timeout=timeout)
    assert time.monotonic() - started < 200


def _write_number(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def test_ranks_end_when_the_tests_are_killed(tmp_path: Path) -> None:
    """They are the server's children, and nobody else would end them."""
    call = (
        "from pathlib import Path\n"
        "from tests.distributed import run_distributed\n"
        "from tests.test_distributed_helper import _write_number\n"
        f"run_distributed(_write_number, 2, Path({str(tmp_path)!r}), timeout=600)"
    )
    with subprocess.Popen([sys.executable, "-c", call]) as tests:
        deadline = time.monotonic() + 120
        while len(ranks := list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        tests.kill()
    assert len(ranks) == 2
    for rank in ranks:
        while _lives(int(rank.name)):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        # Whoever adopts it may leave it as a zombie.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
