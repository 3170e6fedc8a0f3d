"""What serving costs: latency, throughput, memory, energy, money; and simulated batching."""
