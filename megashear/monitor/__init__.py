"""What a person sees of a run: TensorBoard, console, throughput."""
