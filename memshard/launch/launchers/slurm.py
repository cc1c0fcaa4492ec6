"""sbatch scripts: rendered to be read, kept in the run's folder, submitted again by hand with
`sbatch RUN/submit.sh`.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import whole
from memshard.launch.launchers.cluster import Cluster, add_cluster_options, cluster_of
from memshard.launch.launchers.start import (
    HOSTFILE,
    LOGS,
    RENDEZVOUS,
    SUBMIT,
    Start,
    installed,
    shell,
    snapshot,
    torchrun_options,
)
from memshard.launch.ranks import PORTS, Ranks, from_variables, job_port, listening
from memshard.variables import read_number

Flavour = Literal["srun", "torchrun", "deepspeed"]
_FACTS = (
    *("nodes", "gpus", "ranks", "cpus", "notice"),
    *("time", "partition", "account", "qos", "constraint"),
    *("venv", "container", "interface"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `memshard launch slurm`."""
    parser.add_argument(
        "--flavour",
        choices=get_args(Flavour),
        default="srun",
        help="what starts a node's ranks (default srun)",
    )
    parser.add_argument(
        "--array",
        type=whole(),
        default=1,
        metavar="N",
        help="N turns of the job, one after the other, as an array",
    )
    parser.add_argument(
        "--chain",
        type=whole(),
        default=1,
        metavar="N",
        help="N jobs, each waiting for the one before",
    )
    parser.add_argument("--after", metavar="JOB", help="wait until this job has ended")
    add_cluster_options(parser, _FACTS)


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """Write the script and submit it."""
    with usage_errors():
        if min(args.array, args.chain) != 1:
            raise ValueError("give --array N or --chain N, with N of at least 1, not both")
        cluster = cluster_of(args)
        start = installed(args) if args.dry_run else _absolute(snapshot(args))
        job = Job(
            start=start,
            cluster=cluster,
            flavour=args.flavour,
            python="python" if cluster.venv or cluster.container else sys.executable,
            workdir=os.getcwd(),
            turns=args.array,
            requeue=args.chain == 1,
        )
        script = render(job)
        if args.dry_run:
            if not args.json:
                print(script, end="")
            return {"script": script}
        path = Path(start.folder) / SUBMIT
        path.write_text(script, encoding="utf-8")
        jobs: list[str] = []
        for _ in range(args.chain):
            # afterany, whatever the end of the job before: a job that ran out of time is what a
            # chain is for.
            jobs.append(submit(path, jobs[-1] if jobs else args.after))
    logs = f"{start.folder}/log/slurm-*.out, rank*.log"
    if not args.json:
        print(
            f"job {', '.join(jobs)}: {path}\nlogs: {logs}\nwho is late, what is stale: memshard "
            f"doctor {start.folder}"
        )
    return {"jobs": jobs, "script": str(path), "logs": logs, "run": start.folder}


def detect(env: Mapping[str, str]) -> Ranks | None:
    """Return this process's place if it is a task of a SLURM step that does not say otherwise with
    RANK and WORLD_SIZE. A batch script and an interactive shell are no steps: what runs there is
    alone.
    """
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= env.keys() or from_variables(env, ""):
        return None
    address, port = listening(env)
    return Ranks(
        "SLURM",
        read_number(env, "SLURM_PROCID"),
        read_number(env, "SLURM_STEP_NUM_TASKS"),
        read_number(env, "SLURM_LOCALID", "0"),
        address or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
        port or job_port(read_number(env, "SLURM_JOB_ID", "0")),
    )


# Parsed here, since `scontrol show hostnames` is often missing inside a container.
def first_host(nodes: str) -> str:
    """Return the first of a SLURM node list, such as gpu[03-05,9]-ib,login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    # Names may have several ranges: rack[1-2]n[3-4] begins with rack1n3.
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first[0])


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as SLURM is asked for it.

    flavour: what starts a node's ranks. python: the interpreter. workdir: folder from which the
    recipe's relative paths count, by default where sbatch is called. turns: how many times the job
    runs, one after the other, as an array; then it does not requeue itself. requeue: whether a run
    that stopped early goes back into the queue.
    """

    start: Start
    cluster: Cluster
    flavour: Flavour = "srun"
    python: str = "python"
    workdir: str | None = None
    turns: int = 1
    requeue: bool = True


def render(job: Job) -> str:
    """Return the script."""
    cluster, folder = job.cluster, job.start.folder
    options = [f"#SBATCH --{name}={_quoted(name, value)}" for name, value in _options(job)]
    # Without it, a preempted job or one whose node failed would not come back.
    options.append("#SBATCH --requeue")
    blocks = [
        "\n".join(["#!/bin/bash", *options]),
        "set -uo pipefail\n" + "\n".join(_environment(job)),
        f"# What the last start said of its end.\nrm -f {shell([folder])}/heartbeat/rank*.json",
        _WAIT.format(command=" \\\n    ".join(_command(job)), notice=cluster.notice),
        _ending(job),
    ]
    return "\n\n".join(blocks) + "\n"


def submit(script: Path, after: str | None = None) -> str:
    """Hand a script to sbatch, to run once job `after` has ended, and return the job's number.
    OSError with sbatch's words if it refuses.
    """
    command = [
        "sbatch",
        "--parsable",
        *([f"--dependency=afterany:{after}"] if after else []),
        str(script),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(
            "there is no sbatch here: run this where jobs are submitted, or print the script with "
            "--dry-run"
        ) from error
    if done.returncode:
        raise OSError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _absolute(start: Start) -> Start:
    """Return the start with absolute paths: sbatch may run it from elsewhere."""
    recipe, folder, code = (
        str(Path(path or "").resolve()) for path in (start.recipe, start.folder, start.code)
    )
    return replace(start, recipe=recipe, folder=folder, code=code)


def _options(job: Job) -> list[tuple[str, str]]:
    """Return the names and values of the #SBATCH lines."""
    cluster, ranks = job.cluster, job.cluster.ranks_per_node
    tasks = ranks if job.flavour == "srun" else 1
    options = [
        ("job-name", f"memshard-{Path(job.start.folder).name}"),
        ("nodes", str(cluster.nodes)),
        ("ntasks-per-node", str(tasks)),
    ]
    if cluster.gpus:
        options.append(("gpus-per-node", str(cluster.gpus)))
    if cluster.cpus:
        options.append(("cpus-per-task", str(cluster.cpus * ranks // tasks)))
    options.append(("time", cluster.time))
    options += [
        (name, value)
        for name in ("partition", "account", "qos", "constraint")
        if (value := getattr(cluster, name))
    ]
    if job.workdir:
        options.append(("chdir", job.workdir))
    if job.turns > 1:
        # %1: one turn at a time, since all of them continue one run.
        options.append(("array", f"1-{job.turns}%1"))
    number = "%A_%a" if job.turns > 1 else "%j"
    # %A and %a are the array's job and turn; append, because a requeued job keeps its number. A
    # percent sign of the folder is doubled, or SLURM would read %j in it.
    logs = f"{job.start.folder}/{LOGS}".replace("%", "%%")
    return [
        *options,
        ("output", f"{logs}/slurm-{number}.out"),
        ("open-mode", "append"),
        ("signal", f"B:USR2@{cluster.notice}"),
    ]


def _quoted(option: str, value: str) -> str:
    """Return a value as an #SBATCH line takes it: in double quotes, where it holds anything that
    sbatch would split or read as a comment. ValueError for what no line can hold.
    """
    # A line feed would make a line of shell of the rest; a backslash in a path of a log tells SLURM
    # to replace no %j.
    if bad := [
        character for character in value if not character.isprintable() or character == "\\"
    ]:
        raise ValueError(
            f"--{option} would be {value!r}, and an sbatch script cannot hold {bad[0]!r} there: "
            "choose another name"
        )
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    return '"' + value.replace('"', '\\"') + '"'


def _environment(job: Job) -> list[str]:
    cluster = job.cluster
    lines = list(cluster.setup)
    if cluster.venv:
        lines.append(f"source {shell([f'{cluster.venv}/bin/activate'])}")
    values = {"OMP_NUM_THREADS": str(cluster.cpus or 1)}
    if job.start.code:
        # SAFEPATH: a memshard in the working directory must not come first.
        values |= {"PYTHONPATH": job.start.code, "PYTHONSAFEPATH": "1"}
    if job.flavour == "torchrun":
        values |= RENDEZVOUS
    values |= cluster.variables
    lines += [f"export {name}={shell([value])}" for name, value in values.items()]
    lines.append('export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
    # By the job's number, so that two jobs on a node rarely meet; known to all nodes
    # without a message.
    lines.append(f"export MASTER_PORT=$((20000 + SLURM_JOB_ID % {PORTS}))")
    if job.flavour == "deepspeed":
        hosts = shell([f"{job.start.folder}/{HOSTFILE}"])
        lines.append(
            'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\\$/ '
            f'slots={cluster.ranks_per_node}/" > {hosts}'
        )
    return lines


def _command(job: Job) -> list[str]:
    """Return the srun command, line by line."""
    cluster, ranks = job.cluster, job.cluster.ranks_per_node
    container = f"{cluster.container} " if cluster.container else ""
    # Since SLURM 22.05 srun does not take the number of cores from the job.
    srun = "srun --kill-on-bad-exit=1" + (
        " --cpus-per-task=$SLURM_CPUS_PER_TASK" if cluster.cpus else ""
    )
    train = shell(job.start.train)
    if job.flavour == "srun":
        return [f"{srun} {container}{job.python} -m {train}"]
    if job.flavour == "torchrun":
        return [
            f"{srun} {container}{job.python} -m torch.distributed.run --nnodes=$SLURM_NNODES "
            f"--nproc-per-node={ranks}",
            '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" '
            '--rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --max-restarts=3',
            *([" ".join(options)] if (options := torchrun_options(cluster.notice)) else []),
            f"-m -- {train}",
        ]
    hosts = shell([f"{job.start.folder}/{HOSTFILE}"])
    # DeepSpeed's launcher would die of the signal that is meant for the ranks.
    node = (
        f'trap "" USR2; exec {job.python} -m deepspeed.launcher.runner --hostfile={hosts} '
        "--no_ssh --node_rank=$SLURM_NODEID "
        f"--master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --module {train}"
    )
    return [f"{srun} {container}bash -c {shell([node])}"]


_WAIT = """\
# {notice} s before the time limit the shell gets SIGUSR2; the ranks then save, all at the same
# step, and leave with exit code 75.
trap 'scancel --signal=USR2 "$SLURM_JOB_ID"' USR2
trap : TERM  # SLURM signals the ranks itself
{command} &
step=$!
wait $step
code=$?
while kill -0 $step 2>/dev/null; do  # a trap ends wait, not the step
    wait $step
    code=$?
done"""


def _ending(job: Job) -> str:
    stopped = f'grep -qs \'"ended": "stopped"\' {shell([job.start.folder])}/heartbeat/rank0.json'
    if job.turns > 1 or not job.requeue:
        return f"# The next job in line goes on.\nif {stopped}; then code=75; fi\nexit $code"
    return f"""\
# Stopped early: back into the queue, unless SLURM is already ending the job (scancel, or a requeue
# of its own).
if {{ [ $code = 75 ] || {stopped}; }} && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
fi
exit $code"""
