"""Chapter 02: what each distillation term contributes."""
