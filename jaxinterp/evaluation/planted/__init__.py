"""Problems whose answer is known, and how near a method comes."""
