"""What MLX says when Metal gives up a command buffer (metal/device.cpp), by Apple's reason."""

from __future__ import annotations

PREFIX = "[METAL] Command buffer execution failed: "
WATCHDOG = PREFIX + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
VICTIM = (
    PREFIX + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)."
)
IGNORED = PREFIX + (
    "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)."
)
