"""What a training step costs: the dense step it is compared with, and the machine it runs on."""
