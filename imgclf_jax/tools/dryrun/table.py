"""Published figures of accelerators with their sources. They are peaks, which real programs do not reach."""

from dataclasses import dataclass

_CLOUD = "https://cloud.google.com/tpu/docs/"


@dataclass(frozen=True)
class Chip:
    """A chip. Rates are per second; network rates are outgoing, half of a bidirectional figure."""

    platform: str  # of JAX: "tpu", "gpu" or "cpu"
    flops: float  # dense bfloat16 matmuls with float32 accumulation
    flops_tensorfloat32: float  # float32 matmuls with `matmul_precision='tensorfloat32'`
    flops_float32: float  # float32 matmuls with `matmul_precision='float32'`
    memory: float  # bytes
    bandwidth: float  # bytes of the chip's own memory
    links: float  # bytes to chips of the same slice (ICI) or host (NVLink)
    network: float  # bytes to chips of other hosts; 0: links reach all chips
    a_host: int  # chips per host
    source: str

    def peak(self, precision: str, matmul_precision: str) -> float:
        """Returns the peak matmul FLOP/s for the config's `precision` and `matmul_precision`.

        With `precision` "float32", `matmul_precision` applies: "bfloat16" is one bfloat16 pass on a TPU, and
        TensorFloat-32 on a GPU.
        """
        if precision == "bfloat16" or (matmul_precision == "bfloat16" and self.platform == "tpu"):
            return self.flops
        return self.flops_float32 if matmul_precision == "float32" else self.flops_tensorfloat32


# A TPU computes a float32 matmul in three bfloat16 passes at JAX's precision "high", and in six at "highest". A GPU's
# figures are those of tensor cores and of float32 units, dense, without the doubling for sparsity.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 197e12 / 3, 197e12 / 6, 16 << 30, 819e9, 200e9, 0, 8, _CLOUD + "v5e"),
    "v5p": Chip("tpu", 459e12, 459e12 / 3, 459e12 / 6, 95 << 30, 2765e9, 600e9, 0, 4, _CLOUD + "v5p"),
    "v6e": Chip("tpu", 918e12, 918e12 / 3, 918e12 / 6, 32 << 30, 1600e9, 400e9, 0, 8, _CLOUD + "v6e"),
    "h100": Chip("gpu", 989.4e12, 494.7e12, 66.9e12, 84_942_979_072, 3352e9, 450e9, 50e9, 8,
                 "NVIDIA H100 (SXM5, 80 GB) and DGX H100 datasheets; memory as the driver reports it"),
    "a100": Chip("gpu", 312e12, 156e12, 19.5e12, 85_100_068_864, 2039e9, 300e9, 25e9, 8,
                 "NVIDIA A100 (SXM4, 80 GB) and DGX A100 datasheets; memory as the driver reports it"),
}  # fmt: skip

# Facts for XLA's GPU compiler (GpuTargetConfigProto), as the driver reports them: name, compute capability,
# multiprocessors, bytes of shared memory each and by opt-in, float32 units each, L2, GHz.
_CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 233_472, 232_448, 128, 52_428_800, 1.98),
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 167_936, 166_912, 64, 41_943_040, 1.41),
}


def gpu_target(kind: str) -> str:
    """Returns the text proto of a GPU for `target_config` of `jax.experimental.topologies`."""
    name, capability, cores, shared, optin, units, cache, clock = _CARDS[kind]
    chip = CHIPS[kind]
    fields = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49_152, "shared_memory_per_core": shared, "shared_memory_per_block_optin": optin,
        "core_count": cores, "fpus_per_core": units, "l2_cache_size": cache, "clock_rate_ghz": clock,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65_535, "block_dim_limit_z": 65_535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65_536, "registers_per_block_limit": 65_536,
        "memory_bandwidth": int(chip.bandwidth), "device_memory_size": int(chip.memory),
        "runtime_version": '"12.8.0"', "driver_version": '"12.8.0"', "dnn_version": '"9.10.0"',
    }  # fmt: skip
    info = " ".join(f"{key}: {value}" for key, value in fields.items())
    return (f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {capability} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
            f'device_description_str: "{name}"')  # fmt: skip
