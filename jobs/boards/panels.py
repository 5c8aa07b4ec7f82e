"""The panels of our Grafana boards. Queries speak of series of jobs/on_ray/gauges.py and of Ray's own; `$run` is chosen on the board."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """`queries`: PromQL and the legend of its series. `unit` is Grafana's word."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False


def of_run(metric: str, legend: str = "{{run}}", by: str = "run", prefix: str = "") -> tuple[str, str]:
    """A gauge of ours; whichever driver tells the most."""
    return f'{prefix}max by ({by}) (ray_moonlight_{metric}{{run=~"$run"}})', legend


TRAINING = (
    Panel("Loss", "Nats per token of the last logged step that was not skipped; dotted what the newest judged checkpoint has on held-out text", "short", (
        of_run("loss", "{{run}} training"), of_run("evaluation_loss", "{{run}} held out: {{source}}", "run, source"))),
    Panel("Held-out bits per byte", "Of the newest judged checkpoint", "short", (of_run("evaluation_bits_per_byte", "{{run}} {{source}}", "run, source"),)),
    Panel("Progress", "Optimizer steps done of the whole run", "percentunit", (
        ('max by (run) (ray_moonlight_step{run=~"$run"}) / max by (run) (ray_moonlight_steps{run=~"$run"})', "{{run}}"),)),
    Panel("Goodput", "Share of the wall time since the run was asked for in which it made progress that lasts", "percentunit", (of_run("goodput"),)),
    Panel("What became of the wall time", "Since the run was asked for", "s", (of_run("goodput_seconds", "{{run}} {{state}}", "run, state"),), stacked=True),
    Panel("Tokens per second", "Over all ranks", "short", (of_run("tokens_per_second"),)),
    Panel("MFU", "FLOP/s of the model over what the processors could do; none on processors whose peak is not known", "percentunit", (of_run("mfu"),)),
    Panel("Where a step's time goes", "Seconds by phase, mean over ranks", "s", (of_run("step_seconds", "{{run}} {{phase}}", "run, phase"),), stacked=True),
    Panel("Waiting for data", "Share of a step, mean over ranks", "percentunit", (
        ('max by (run) (ray_moonlight_step_seconds{run=~"$run", phase="data"}) / sum by (run) (max by (run, phase) (ray_moonlight_step_seconds{run=~"$run"}))', "{{run}}"),)),
    Panel("Slowest rank", "Seconds of a step that the rank the others wait for takes more than they, and in which phase", "s", (
        of_run("slowest_rank_seconds", "{{run}} rank {{rank}}: {{phase}}", "run, rank, phase"),)),
    Panel("Memory of the ranks", "Peak of the rank that has the most", "bytes", (of_run("memory_peak_bytes"),)),
    Panel("Memory of the nodes", "Used, of what they have", "percentunit", (
        ("max by (instance) (ray_node_mem_used) / max by (instance) (ray_node_mem_total)", "{{instance}}"),)),
    Panel("Gradient norm", "Before clipping", "short", (of_run("gradient_norm"),)),
    Panel("Learning rate", "", "sci", (of_run("learning_rate"),)),
    Panel("Bias rate of the router", "", "sci", (of_run("bias_rate"),)),
    Panel("Batch", "Sequences of a step", "short", (of_run("global_batch"),)),
    Panel("Busiest expert", "Tokens of the busiest expert of any layer over the mean; 1 is perfect balance", "short", (of_run("expert_load"),)),
    Panel("Skipped steps and spikes", "Since the run began: non-finite steps, which change nothing, and steps far above the run's own", "short", (
        of_run("skipped_steps", "{{run}} skipped"), of_run("spikes", "{{run}} spikes"))),
    Panel("Starts of the training group", "Since the run began", "short", (of_run("attempts"),)),
    Panel("Work at risk", "Time since the newest checkpoint, or since this attempt began", "s", (of_run("checkpoint_timestamp_seconds", prefix="time() - "),)),
)  # fmt: skip

DATA = (
    Panel("Units done", "Of the current phase", "percentunit", (
        ('max by (run) (ray_moonlight_prepare_units_done{run=~"$run"}) / max by (run) (ray_moonlight_prepare_units{run=~"$run"})', "{{run}}"),)),
    Panel("Units that failed", "They killed their worker, and are in quarantine whole", "short", (of_run("prepare_units_failed"),)),
    Panel("Documents", "Read in the current phase by this attempt", "short", (of_run("prepare_documents"),)),
    Panel("Text", "Bytes a second", "Bps", (('max by (run) (deriv(ray_moonlight_prepare_text_bytes{run=~"$run"}[2m]))', "{{run}}"),)),
    Panel("Tokens", "A second", "short", (('max by (run) (deriv(ray_moonlight_prepare_tokens{run=~"$run"}[2m]))', "{{run}}"),)),
    Panel("Rows of Ray Data", "Descriptions of units that its tasks have given back", "short", (
        ("max by (dataset, operator) (ray_data_output_rows)", "{{dataset}} {{operator}}"),)),
    Panel("Tasks of Ray Data", "Running", "short", (
        ("max by (dataset, operator) (ray_data_num_tasks_running)", "{{dataset}} {{operator}}"),)),
    Panel("Tasks by state", "Of all of Ray", "short", (("sum by (State) (ray_tasks)", "{{State}}"),)),
    Panel("CPUs in use", "Of the nodes", "percent", (("max by (instance) (ray_node_cpu_utilization)", "{{instance}}"),)),
    Panel("Disk in use", "Of the nodes: units are built in local files", "percent", (("max by (instance) (ray_node_disk_utilization_percentage)", "{{instance}}"),)),
)  # fmt: skip

CLUSTER = (
    Panel("GPU utilisation", "Ray's own figure, a mean over GPUs", "percent", (
        ('avg by (ray_io_cluster) (ray_node_gpus_utilization{ray_io_cluster=~"$run-.*"})', "{{ray_io_cluster}}"),)),
    Panel("Waiting in the queues", "", "short", (
        ('max by (cluster_queue, status) (kueue_pending_workloads{cluster_queue=~"moonlight-.*"})', "{{cluster_queue}} {{status}}"),)),
    Panel("RayJobs", "", "short", (
        ('count by (deployment_status) (kuberay_job_deployment_status{namespace="moonlight", name!~"template-.*"})', "{{deployment_status}}"),)),
)  # fmt: skip
