"""Chapter 03: what each distillation term contributes."""
