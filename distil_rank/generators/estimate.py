"""What a training will take: memory and time on a GPU, from closed forms.

    memory = 16 P_s + 4 P_t + (88 or 48) n L d + 40 n d_t + 4 V d + 64 MiB    bytes a device
             with --gradient-checkpointing: 4 n L d + max(88 n d, 40 n d_t + 64 MiB) for the same
    time   = tokens (6 P_s + 2 P_t) / (devices, peak, utilization)

P parameters, L layers, d width, V vocabulary, n tokens of a micro-batch; s student, t teacher. 16:
weights, gradients and AdamW's moments in float32. 88 bytes (float32) or 48 (bfloat16) a token,
layer and feature were measured on a CPU and are held by a test; the utilization is an assumption.
"""

from typing import Any

from distil_rank.core.errors import hub_errors
from distil_rank.core.tables import markdown
from distil_rank.generators.prepared import Prepared

UTILIZATION = 0.3  # of the peak, assumed
# name: memory in GB, peak of bfloat16 and of TF32 in TFLOP/s, as the vendor states them
HARDWARE = {"RTX 4090": (24, 165, 83), "A100": (80, 312, 156), "H100": (80, 989, 495)}


def gpt2_parameters(c: Any) -> int:
    """Parameters of a GPT-2 by its configuration, the head tied."""
    table = (c.vocab_size + c.n_positions) * c.n_embd
    return int(table + c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd) + 2 * c.n_embd)


def working_bytes(
    student: Any, teacher: Any, tokens: int, half: bool, checkpointing: bool = False
) -> int:
    """Activations, loss and head gradient for a micro-batch of `tokens`, padding included."""
    layer = (48 if half else 88) * tokens * student.n_embd
    head = 4 * student.vocab_size * student.n_embd
    loss = 40 * tokens * teacher.n_embd + (64 << 20)
    if checkpointing:  # states between layers; within one, then the loss or the layer
        return 4 * tokens * student.n_layer * student.n_embd + max(layer, loss) + head
    return student.n_layer * layer + loss + head


def expected(flags: Any, data: Prepared) -> str:
    """Memory and hours of `generator train` with these flags, on one and eight of HARDWARE.

    A batch is taken to fill its context in memory, and to have the mean length in time.
    """
    from transformers import AutoConfig, GPT2Config

    with hub_errors("a GPT-2", f"check {flags.teacher}"):
        teacher: Any = AutoConfig.from_pretrained(flags.teacher)
        if teacher.model_type != "gpt2":
            raise ValueError(f"a {teacher.model_type}")
    context = data.record["context"]
    student: Any = GPT2Config(vocab_size=teacher.vocab_size, n_positions=teacher.n_positions)
    student.n_layer, student.n_head, student.n_embd = flags.shape
    own, its, counts = gpt2_parameters(student), gpt2_parameters(teacher), data.record["parts"]
    proteins, half = max(1, counts["train"]["proteins"]), flags.dtype != "float32"
    read = flags.steps * flags.batch_size
    tokens = read * counts["train"]["tokens"] / proteins
    rows = [["hardware", "devices", "memory a device (GB)", "tokens/s", "hours"]]
    for name, (memory, bfloat16, tf32) in HARDWARE.items():
        for devices in (1, 8):
            micro = -(-flags.batch_size // (devices * flags.accumulation)) * context
            working = working_bytes(student, teacher, micro, half, flags.gradient_checkpointing)
            needed = (16 * own + 4 * its + working) / 1e9
            peak = devices * UTILIZATION * 1e12 * (bfloat16 if half else tf32)
            rate = peak / (6 * own + 2 * its)
            fits = f"{needed:.1f} of {memory}{'' if needed < 0.9 * memory else ': too much'}"
            rows.append([name, str(devices), fits, f"{rate:,.0f}", f"{tokens / rate / 3600:.2g}"])
    return (
        f"{own:,} parameters from {its:,}; {tokens:,.0f} tokens, {read / proteins:.2f} passes over"
        f" {proteins:,} proteins; not measured: {UTILIZATION:.0%} of the vendor's peak assumed\n"
        + markdown(rows)
    )
