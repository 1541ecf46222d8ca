// Pieces of pages. Text reaches the page as text nodes only, so that nothing in a token, a label or a name is markup.
'use strict';

const SVG = 'http://www.w3.org/2000/svg';
const ACTS = {'\n': '↵', '\t': '⇥', '\r': '␍'};

function make(tag, given, ...inside) {
  const [name, ...classes] = tag.split('.');
  const node = ['svg', 'rect', 'line', 'text'].includes(name) ? document.createElementNS(SVG, name)
    : document.createElement(name);
  if (classes.length) node.setAttribute('class', classes.join(' '));
  for (const [key, value] of Object.entries(given || {})) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key.startsWith('--')) node.style.setProperty(key, value);
    else if (value === true) node.setAttribute(key, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...inside.flat().filter(one => one !== null && one !== undefined && one !== ''));
  return node;
}

// What a browser would hide or act upon is shown: control, format (bidirectional overrides) and unassigned characters.
function visible(text) {
  return text.replace(/[\n\t\r]/g, c => ACTS[c])
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu, c => '\\u' + c.codePointAt(0).toString(16).padStart(4, '0'));
}
const alone = text => text === '' ? '∅' : visible(text).replace(/^ +| +$/g, s => '·'.repeat(s.length));

function num(value, digits = 3) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  return (size >= 1e-3 && size < 1e5 ? value.toLocaleString('en', {maximumSignificantDigits: digits})
    : value.toExponential(digits - 1)).replace('-', '−');
}
const percent = value => value === null ? '–' : num(100 * value, 2) + ' %';
const code = text => make('code', {}, alone(text));

// A token with its line breaks: the sign, and a new line.
const broken = token => token === '' ? ['∅'] : token.split('\n').flatMap((piece, at) => at
  ? ['↵', make('br'), visible(piece)] : [visible(piece)]);

// Tokens with a background as strong as the activation.
function heated(tokens, values, {peak = -1, pick = null} = {}) {
  const most = Math.max(...values.map(Math.abs), 1e-9);
  const line = make('p.snippet');
  tokens.forEach((token, at) => {
    const share = values[at] / most;
    const named = values[at] ? visible(token) + ': ' + num(values[at]) : null;
    const given = {'--a': (0.55 * Math.abs(share)).toFixed(2), title: named};
    const kind = (share < 0 ? '.minus' : '') + (at === peak ? '.peak' : '');
    line.append(pick ? make('button' + kind, {...given, type: 'button', 'aria-pressed': String(pick.now === at),
      onclick: () => pick.choose(at)}, broken(token)) : make('span' + kind, given, broken(token)));
  });
  return line;
}

function histogram({edges, counts}) {
  const width = 460, height = 120, most = Math.max(...counts, 1), wide = width / counts.length;
  const total = counts.reduce((sum, each) => sum + each, 0);
  const says = total + ' firings, from ' + num(edges[0]) + ' to ' + num(edges[edges.length - 1]);
  // Heights are on a logarithmic scale: a single firing can be seen beside a thousand.
  const tall = count => count ? height * (0.06 + 0.94 * Math.log1p(count) / Math.log1p(most)) : 0;
  const bars = counts.map((count, at) => make('rect', {x: at * wide + 0.5, y: height - tall(count),
    width: Math.max(wide - 1, 0.5), height: tall(count)}));
  const drawing = make('svg.histogram', {viewBox: `0 0 ${width} ${height + 18}`, role: 'img', 'aria-label': says},
    make('line', {x1: 0, x2: width, y1: height, y2: height}), bars,
    make('text', {x: 0, y: height + 14}, num(edges[0])),
    make('text', {x: width, y: height + 14, 'text-anchor': 'end'}, num(edges[edges.length - 1])));
  return make('figure', {}, drawing, make('figcaption', {}, says + '; heights are logarithmic.'));
}

function bars(pairs, label) {
  const most = Math.max(...pairs.map(pair => Math.abs(pair[1])), 1e-9);
  return make('ul.bars', {}, pairs.map(([name, value]) => make('li' + (value < 0 ? '.minus' : ''),
    {'--w': (100 * Math.abs(value) / most).toFixed(1)},
    label(name), make('span.value', {}, num(value)))));
}

const words = row => row.label ? row.label : row.peaks.map(alone).join('  ') || 'never fires';
const link = i => make('a', {href: '#/f/' + i}, '#' + i);

function field(label, input, extra) { return make('label.field', {}, make('span', {}, label), input, extra || ''); }

function card(title, ...inside) { return make('section.card', {}, make('h3', {}, title), ...inside); }

// A feature's page, but for its label and what can be done with it.
function featureCards(page, {own = true} = {}) {
  const to = i => own ? link(i) : make('span', {}, '#' + i);
  const cards = [];
  const groups = new Map();
  for (const one of page.contexts) groups.set(one.group, [...(groups.get(one.group) || []), one]);
  if (groups.size) cards.push(card('Where it fires', ...[...groups].flatMap(([name, ones]) => [
    make('h4', {}, name === 'top' ? 'Strongest' : 'Around the ' + name),
    ...ones.map(one => heated(one.tokens, one.values, {peak: one.peak}))])));
  if (page.raised.length) cards.push(make('section.card.two', {},
    make('div', {}, make('h3', {}, 'Logits it raises'), bars(page.raised, code)),
    make('div', {}, make('h3', {}, 'Logits it lowers'), bars(page.lowered, code)),
    make('p.note', {}, 'The direct path alone, per unit of activation; later layers are left out.')));
  if (page.fired) cards.push(card('Activations that are not zero', histogram(page.histogram)));
  const near = [['Write vectors alike', page.neighbours.write], ['Read vectors alike', page.neighbours.read],
    ['Fire together (correlation)', page.correlated]].filter(([, pairs]) => pairs.length);
  if (near.length) cards.push(make('section.card.three', {}, ...near.map(([title, pairs]) =>
    make('div', {}, make('h3', {}, title), bars(pairs, to)))));
  if (page.heads) cards.push(card('Heads in its read vector',
    bars(page.heads.map((share, head) => ['head ' + head, share]), name => make('span', {}, name))));
  return cards;
}

function facts(page) {
  const pairs = [['fires on', percent(page.density)], ['largest', num(page.largest)], ['mean', num(page.mean)],
    ['read · write', num(page.cosine)]];
  return make('dl.facts', {}, pairs.map(([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, value))));
}
