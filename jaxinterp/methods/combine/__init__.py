"""Methods made of other methods: several at once, several seeds, one a layer, revived features."""
