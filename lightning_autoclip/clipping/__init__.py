"""What happens in a step: measure, record, decide, clip. Serves any PyTorch loop; knows no Trainer."""
