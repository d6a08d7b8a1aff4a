"""Methods that learn virtual tokens: an encoder makes them, one mechanism puts them in front of any batch."""
