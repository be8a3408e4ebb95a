"""Fine-tuning: LoRA adapters and quantised base weights."""
