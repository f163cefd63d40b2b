"""How the frameworks use a processor. Neither is imported here: both have to be told before they start."""

import os


def split_processor(parts: int) -> None:
    """Makes JAX see the processor as so many devices; see `TrainConfig.cpu_devices`.

    Accelerators are not affected; flags that the user set win. XLA shares only matrix products between cores, whole
    steps on parts of the batch share everything. Measured on two cores with the 1.5 M parameter model: 0.62 s per
    step as one device, 0.34 s as two.
    """
    if parts > 1:
        flags = f"--xla_force_host_platform_device_count={parts} --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def wait_asleep() -> None:
    """Makes PyTorch's threads sleep, not spin, while they wait for each other; what the user set wins.

    Loading data, a simulator or a robot's drivers need the same cores. Threads that spin in their way cost much more
    than waking costs. Measured on two cores that other programs use, too, with the 1.5 M parameter model: 2.3 s per
    step spinning, 0.25 s sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
