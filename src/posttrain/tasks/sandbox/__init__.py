"""Programs that nobody has read, run where they can do no harm."""

from posttrain.tasks.sandbox.sandbox import Bubblewrap, NoSandbox, Running, Sandbox, SandboxFailed, SandboxLost

__all__ = ["Bubblewrap", "NoSandbox", "Running", "Sandbox", "SandboxFailed", "SandboxLost"]
