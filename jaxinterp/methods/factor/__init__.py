"""Methods that factorise, solve or classify: semi-NMF, experts, interaction bases, regressions, neuron classes."""
