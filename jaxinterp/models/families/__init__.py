"""From the configurations and tensor names of published model families to ours."""
