/** Whether a name has what none may have: control characters, ends of lines, halves of characters. Joiners of letters and emoji are fine. */
export function hasControlCharacters(text: string): boolean {
  return /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}]/u.test(text)
}
