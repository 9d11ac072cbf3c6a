"""`specgen`: serve, replay, demo, evaluate, optimize, doctor. Data on stdout, talk on stderr; bad input: exit 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from specgen_engine.errors import SpecGenError
from specgen_engine.leaving import unwound_on_sigterm

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="sglang.launch_server with --enable-specgen; --cpu and --smollm add what a machine without a GPU needs.",
)
def serve(context: typer.Context) -> None:
    from specgen_engine.serving.command import serve as run

    run(context.args)


@app.command()
def replay(
    traces: Annotated[list[Path], typer.Argument(help="trace folders, or folders of them", metavar="DIR...")],
    mode: Annotated[str, typer.Option(help="sequential: reason, then evaluate; specgen: end early")] = "specgen",
    trigger: Annotated[str, typer.Option(help="as the server's --specgen-trigger; none")] = "every:1000",
    termination: Annotated[str, typer.Option(help="as the server's --specgen-termination")] = "gain:0.3",
    json: Annotated[
        Path | None, typer.Option(help="write the report (specgen.report/1) to this file", metavar="FILE")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="play only the first N iterations of each trace")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="candidates evaluated at once")] = 1,
    model: Annotated[
        str | None, typer.Option(help="model folder; default: a tiny random-weight model on the CPU")
    ] = None,
    page_size: Annotated[int, typer.Option(help="KV page size in tokens")] = 1,
    base_share: Annotated[
        float, typer.Option(help="share of steps that a base decodes in while its forks do; 1: never steps aside")
    ] = 0.25,
) -> None:
    """Recorded reasoning through the real engine: it computes every token; recorded ids replace the sampled ones."""
    from specgen_engine.replay.command import ReplayOptions
    from specgen_engine.replay.command import replay as run

    run(
        ReplayOptions(
            tuple(traces), mode, trigger, termination, json, iterations, workers, model, page_size, base_share
        )
    )


@app.command()
def demo() -> None:
    """Sequential and SpecGen on the bundled CPU trace: both timelines, the accepted kernel, the ratio."""
    from specgen_engine.replay.demo import demo as run

    run()


@app.command()
def evaluate(
    task: Annotated[
        Path, typer.Argument(help="KernelBench module, task.yml, FlashInfer Trace definition, or a folder of one")
    ],
    candidates: Annotated[
        list[Path], typer.Argument(help="modules, .cu files, Solutions (.json), recorded answers (.md)")
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda:N")] = "cpu",
    profile: Annotated[bool, typer.Option("--profile", help="profile the correct ones")] = False,
    profile_tool: Annotated[
        str, typer.Option(help="with --profile: ncu, nsys, cupti, torch.profiler; auto: the best that works here")
    ] = "auto",
    json: Annotated[
        Path | None, typer.Option(help="write verdicts (specgen.verdicts/1) to this file", metavar="FILE")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="add FlashInfer Traces to this .jsonl (FlashInfer tasks)", metavar="FILE")
    ] = None,
) -> None:
    """Compile, check and time candidate kernels; exit 0 when all ran, whatever their verdicts."""
    from specgen_engine.evaluation.command import evaluate as run

    run(task, candidates, device=device, profile=profile_tool if profile else "", json=json, traces=traces)


@app.command()
def optimize(
    task: Annotated[Path, typer.Argument(help="reference module: Model, get_inputs, get_init_inputs")],
    base_url: Annotated[
        str, typer.Option(envvar="OPENAI_BASE_URL", help="any OpenAI endpoint; ours forks, others don't")
    ] = "http://127.0.0.1:30000/v1",
    model: Annotated[str, typer.Option(help="default: the first that the endpoint serves")] = "",
    iterations: Annotated[int, typer.Option(help="of each search")] = 4,
    minutes: Annotated[float | None, typer.Option(help="wall time of the run")] = None,
    tokens: Annotated[int | None, typer.Option(help="generated tokens, forks' included")] = None,
    gpu_seconds: Annotated[float | None, typer.Option(help="seconds of evaluation")] = None,
    searches: Annotated[int, typer.Option(help="searches side by side; they share the best kernel")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda:N, for what the endpoint does not judge itself")] = "cpu",
    profile: Annotated[
        str, typer.Option(help="profiles correct kernels: auto, ncu, nsys, cupti, torch.profiler; '' for none")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(help="of one answer, reasoning included")] = 32_768,
    temperature: Annotated[float | None, typer.Option(help="default: the endpoint's")] = None,
    trigger: Annotated[str | None, typer.Option(help="default: the server's")] = None,
    termination: Annotated[str | None, typer.Option(help="default: the server's")] = None,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="the server replays: ask for iteration N of the recording at iteration N")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="history, best kernel, report (default: ./specgen-TASK)")] = None,
    json: Annotated[
        Path | None, typer.Option(help="write the report (specgen.optimize/1) to this file too", metavar="FILE")
    ] = None,
) -> None:
    """Generate, validate, profile, and again, within budgets; the same command goes on after Ctrl-C or a crash."""
    from specgen_engine.agent.command import optimize as run
    from specgen_engine.agent.command import options_of

    run(
        options_of(
            task, base_url=base_url, model=model, iterations=iterations, minutes=minutes, tokens=tokens,
            gpu_seconds=gpu_seconds, searches=searches, device=device,
            profile=profile, max_tokens=max_tokens, temperature=temperature,
            trigger=trigger, termination=termination, recorded=recorded, out=out, json=json,
        )
    )  # fmt: skip


@app.command()
def lend(
    size: Annotated[str, typer.Option("--specgen-kv-lend", help="auto, or a size: 24GiB, 500MB", metavar="BYTES|auto")],
    device: Annotated[int, typer.Option(min=0, help="the GPU whose memory is lent")] = 0,
    backend: Annotated[
        Literal["cuda", "loopback"], typer.Option(help="loopback: shared memory, without a GPU")
    ] = "cuda",
    directory: Annotated[Path | None, typer.Option(help="of the socket; default: where servers look")] = None,
    chunk_mib: Annotated[int, typer.Option(min=1, help="size of a chunk; the same at server and lenders")] = 64,
    name: Annotated[str, typer.Option(help="of the socket")] = "",
) -> None:
    """Lend an evaluator GPU's spare memory to servers on this host that run with --specgen-kv peer."""
    from specgen_engine.tier.lend import lend as run

    raise SystemExit(run(size, device, backend, directory, chunk_mib, name))


@app.command()
def evaluator(
    gpus: Annotated[str | None, typer.Option(help="GPUs to evaluate on, as nvidia-smi counts: 1,2,3")] = None,
    cpus: Annotated[int, typer.Option(min=0, help="instead of GPUs: workers on the CPU")] = 0,
    join: Annotated[
        str | None, typer.Option(help="address of a pool that runs; default: start one", metavar="ADDRESS")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="of a new pool: processes on one GPU: they compile side by side")
    ] = 2,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of a new pool")] = 6380,
    journal: Annotated[
        Path | None, typer.Option(help="of a new pool: file in which jobs outlive a crash", metavar="FILE")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="serve the pool's Prometheus series here")
    ] = None,
    lend: Annotated[
        str | None,
        typer.Option(help="of a new pool: memory of each GPU that servers may use for KV pages", metavar="BYTES"),
    ] = None,
    sandbox: Annotated[
        Literal["auto", "require", "off"],
        typer.Option(help="of a new pool: isolation of candidates, as a server's --specgen-sandbox"),
    ] = "auto",
) -> None:
    """Evaluators for a pool that several servers share, on a Ray cluster; runs until Ctrl-C."""
    from specgen_engine.evaluation.limits import EvaluationLimits
    from specgen_engine.pools.evaluator import EvaluatorOptions, parse_gpus
    from specgen_engine.pools.evaluator import evaluator as run

    indices = parse_gpus(gpus) if gpus is not None else ()
    limits = EvaluationLimits(sandbox={"auto": "prefer"}.get(sandbox, sandbox))
    run(EvaluatorOptions(indices, cpus, join, workers, port, journal, metrics_port, lend, limits))


@app.command()
def doctor(
    json: Annotated[Path | None, typer.Option(help="write the findings to this file", metavar="FILE")] = None,
) -> None:
    """Versions, GPUs, compilers, profilers, hooks; and what each missing piece costs."""
    from specgen_engine.doctor import doctor as run

    run(json)


def main() -> None:
    try:
        with unwound_on_sigterm():
            app()
    except (SpecGenError, ValueError) as error:
        print(f"specgen: {error}", file=sys.stderr)
        raise SystemExit(2) from None
