/* The script of the graph's page: it draws what the JSON beside it says, and asks nobody. */
(function () {
  'use strict';
  var data = JSON.parse(document.getElementById('graph-data').textContent);
  var doc = data.graph, extra = data.extra, SVG = 'http://www.w3.org/2000/svg';
  var tokens = doc.metadata.prompt_tokens, byId = {}, MOST_LINES = 1500;

  var KIND = {'cross layer transcoder': 'feature', 'mlp reconstruction error': 'error', embedding: 'token',
    logit: 'target', bias: 'bias'};
  var nodes = doc.nodes.filter(function (n) { return n.feature_type !== 'bias'; }).map(function (n) {
    var node = {id: n.node_id, kind: KIND[n.feature_type] || 'feature', position: n.ctx_idx, raw: n,
      layer: n.layer === 'E' ? -1 : Number(n.layer), into: [], onto: [],
      influence: n.influence === null || n.influence === undefined ? 0 : n.influence};
    if (node.kind === 'feature') node.place = n.node_id.split('_').slice(0, 2).join('_');
    byId[node.id] = node;
    return node;
  });
  var top = 1 + Math.max.apply(null, nodes.map(function (n) { return n.kind === 'target' ? 0 : n.layer; }));
  nodes.forEach(function (n) { if (n.kind === 'target') n.layer = top; });
  var links = doc.links.map(function (l, i) {
    return {s: byId[l.source], t: byId[l.target], w: l.weight, share: extra.shares[i]};
  }).filter(function (l) { return l.s && l.t; });
  links.forEach(function (l) { l.s.onto.push(l); l.t.into.push(l); });

  var state = {selected: null, pinned: [], groups: [], names: {}, node: doc.metadata.node_threshold || 1, edge: 1,
    errors: true};

  function make(tag, attributes, parent, text) {
    var svg = /^(svg|g|path|circle|rect|line|text|title|polygon)$/.test(tag) && parent && parent.namespaceURI === SVG;
    var one = svg || tag === 'svg' ? document.createElementNS(SVG, tag) : document.createElement(tag);
    Object.keys(attributes || {}).forEach(function (name) { one.setAttribute(name, attributes[name]); });
    if (text !== undefined) one.textContent = text;
    if (parent) parent.appendChild(one);
    return one;
  }
  function at(id) { return document.getElementById(id); }
  function shown(text) { return text.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/ /g, '·'); }
  function fixed(x) {
    if (x === null || x === undefined) return '';
    var size = Math.abs(x);
    return size !== 0 && (size < 0.001 || size >= 1e4) ? x.toExponential(1) : x.toFixed(size < 1 ? 3 : 2);
  }
  function target(n) { var m = /Output "([\s\S]*)" \(p=/.exec(n.raw.clerp); return m ? m[1] : n.raw.clerp; }
  function title(n) {
    if (n.kind === 'token') return 'token “' + shown(tokens[n.position]) + '”';
    if (n.kind === 'target') return 'output “' + shown(target(n)) + '”';
    if (n.kind === 'error') return 'error of layer ' + n.layer;
    return state.names[n.place] || n.raw.clerp || 'feature ' + n.place.split('_')[1];
  }
  function where(n) {
    if (n.kind === 'target') return (100 * n.raw.token_prob).toFixed(1) + ' %';
    if (n.kind === 'token') return 'position ' + n.position;
    var at = '“' + shown(tokens[n.position]) + '” (' + n.position + ')';
    return 'layer ' + n.layer + (n.kind === 'feature' ? ', feature ' + n.place.split('_')[1] : '') + ', at ' + at;
  }

  // ---- what is visible: nodes by their cumulative influence, links by their cumulative share
  function visible() {
    var on = {}, live = [];
    nodes.forEach(function (n) {
      var fixedOne = n.kind === 'token' || n.kind === 'target' || state.pinned.indexOf(n.id) >= 0;
      on[n.id] = fixedOne || (n.influence <= state.node + 1e-9 && (state.errors || n.kind !== 'error'));
    });
    var changed = true;
    while (changed) {  // a feature or error that leads nowhere goes
      changed = false;
      live = links.filter(function (l) { return l.share <= state.edge + 1e-9 && on[l.s.id] && on[l.t.id]; });
      var leads = {};
      live.forEach(function (l) { leads[l.s.id] = true; });
      nodes.forEach(function (n) {
        var keep = n.kind === 'token' || n.kind === 'target' || state.pinned.indexOf(n.id) >= 0 || leads[n.id];
        if (on[n.id] && !keep) { on[n.id] = false; changed = true; }
      });
    }
    return {on: on, links: live, nodes: nodes.filter(function (n) { return on[n.id]; })};
  }

  // ---- the picture
  var canvas = at('canvas'), drawn = {}, lines = [], now = null;
  function draw() {
    now = visible();
    var cells = {}, wide = tokens.map(function () { return 1; });
    now.nodes.forEach(function (n) {
      var cell = n.position + ',' + n.layer;
      (cells[cell] = cells[cell] || []).push(n);
      wide[n.position] = Math.max(wide[n.position], cells[cell].length * (n.kind === 'target' ? 1.6 : 1));
    });
    var rows = top + 2, height = Math.max(46, Math.min(84, 520 / rows)), left = 62, head = 78;
    var x = [], total = left;
    wide.forEach(function (count, p) {
      var width = Math.max(52, count * 17 + 14);
      x.push({start: total, width: width});
      total += width;
    });
    function y(layer) { return head + (top - layer) * height; }
    var svg = make('svg', {width: total + 70, height: head + rows * height + 8, role: 'group',
      'aria-label': 'graph: layers upwards, positions to the right'});
    x.forEach(function (column, p) {
      if (p % 2) make('rect', {'class': 'column-band', x: column.start, y: head - 18, width: column.width,
        height: rows * height}, svg);
    });
    for (var layer = -1; layer <= top; layer++) {
      make('line', {'class': 'row-line', x1: left, x2: total, y1: y(layer) + height / 2, y2: y(layer) + height / 2}, svg);
      make('text', {x: 8, y: y(layer) + 4}, svg, layer < 0 ? 'tokens' : layer === top ? 'output' : 'layer ' + layer);
    }
    Object.keys(cells).forEach(function (cell) {
      var group = cells[cell], column = x[group[0].position];
      group.sort(function (a, b) { return a.influence - b.influence || (a.id < b.id ? -1 : 1); });
      group.forEach(function (n, i) {
        n.x = column.start + column.width * (i + 0.5) / group.length;
        n.y = y(n.layer);
      });
    });
    var under = make('g', {}, svg);
    lines = [];
    var largest = {};
    now.links.forEach(function (l) { largest[l.t.id] = Math.max(largest[l.t.id] || 0, Math.abs(l.w)); });
    now.links.slice().sort(function (a, b) { return a.share - b.share; }).slice(0, MOST_LINES).forEach(function (l) {
      var middle = (l.s.y + l.t.y) / 2;
      var path = make('path', {'class': 'link', 'stroke-width': (0.5 + 2.2 * Math.abs(l.w) / largest[l.t.id]).toFixed(2),
        d: 'M' + l.s.x + ',' + l.s.y + 'C' + l.s.x + ',' + middle + ' ' + l.t.x + ',' + middle + ' ' + l.t.x + ',' + l.t.y},
        under);
      lines.push({link: l, path: path});
    });
    drawn = {};
    now.nodes.forEach(function (n) {
      var g = make('g', {'class': 'node ' + n.kind, tabindex: 0, role: 'button', 'data-id': n.id,
        transform: 'translate(' + n.x.toFixed(1) + ',' + n.y.toFixed(1) + ')',
        'aria-label': title(n) + ', ' + where(n)}, svg);
      make('circle', {'class': 'halo', r: 9.5}, g);
      if (n.kind === 'feature') make('circle', {'class': 'shape', r: 5.6}, g);
      else if (n.kind === 'error') make('polygon', {'class': 'shape', points: '0,-6 6,0 0,6 -6,0'}, g);
      else make('rect', {'class': 'shape', x: -5.5, y: -5.5, width: 11, height: 11, rx: 2}, g);
      make('title', {}, g, title(n) + '\n' + where(n));
      if (n.kind === 'token' || n.kind === 'target') {
        var up = n.kind === 'target';
        make('text', {'class': 'token-text', 'text-anchor': up ? 'start' : 'middle', x: up ? 5 : 0, y: up ? -10 : 21,
          transform: up ? 'rotate(-38)' : ''}, g, cut(shown(up ? target(n) : tokens[n.position]), up ? 14 : 9));
      }
      drawn[n.id] = g;
    });
    canvas.replaceChildren(svg);
    at('count').textContent = now.nodes.length + ' nodes, ' + now.links.length + ' links';
    mark();
  }
  function cut(text, most) { return text.length > most ? text.slice(0, most - 1) + '…' : text; }

  function mark() {
    var chosen = state.selected && byId[state.selected];
    Object.keys(drawn).forEach(function (id) {
      var g = drawn[id];
      g.setAttribute('class', 'node ' + byId[id].kind + (state.pinned.indexOf(id) >= 0 ? ' pinned' : '') +
        (id === state.selected ? ' selected' : ''));
      g.style.removeProperty('--much');
    });
    lines.forEach(function (l) { l.path.setAttribute('class', 'link'); });
    if (!chosen) return;
    var largest = 1e-12;
    lines.forEach(function (l) {
      if (l.link.s === chosen || l.link.t === chosen) largest = Math.max(largest, Math.abs(l.link.w));
    });
    lines.forEach(function (l) {
      var into = l.link.t === chosen, onto = l.link.s === chosen;
      if (!into && !onto) return;
      var sign = l.link.w >= 0 ? ' plus' : ' minus', other = drawn[(into ? l.link.s : l.link.t).id];
      l.path.setAttribute('class', 'link' + (into ? ' in' : ' out') + sign);
      l.path.parentNode.appendChild(l.path);
      if (other) {
        other.setAttribute('class', other.getAttribute('class') + ' near' + sign);
        other.style.setProperty('--much', (0.15 + 0.75 * Math.abs(l.link.w) / largest).toFixed(2));
      }
    });
  }

  // ---- the panel
  function edges(parent, heading, list, other, constant) {
    make('h3', {}, parent, heading);
    if (!list.length && !constant) { make('p', {'class': 'empty'}, parent, 'none in this graph'); return; }
    var largest = Math.max.apply(null, list.map(function (l) { return Math.abs(l.w); }).concat(Math.abs(constant || 0)));
    var ul = make('ul', {'class': 'edges'}, parent);
    function row(w, text, hint, id) {
      var li = make('li', {}, ul);
      make('span', {'class': 'w ' + (w >= 0 ? 'plus' : 'minus'), style: '--w:' + (100 * Math.abs(w) / largest).toFixed(1)},
        li, (w >= 0 ? '+' : '−') + fixed(Math.abs(w)));
      if (!id) { make('span', {title: hint}, li, text); return; }
      var button = make('button', {type: 'button', 'data-go': id, title: hint}, li, text);
      button.addEventListener('click', function () { select(id, true); });
    }
    if (constant) row(constant, 'constants (bias)', 'biases, positions, and what the MLPs write at the first position');
    list.slice().sort(function (a, b) { return Math.abs(b.w) - Math.abs(a.w); }).slice(0, 40).forEach(function (l) {
      var n = l[other];
      row(l.w, title(n) + ' · ' + (n.kind === 'target' || n.kind === 'token' ? where(n) :
        'L' + n.layer + (n.place ? '/' + n.place.split('_')[1] : '') + ' at “' + shown(tokens[n.position]) + '”'), where(n), n.id);
    });
  }
  function panel() {
    var box = at('panel'), n = state.selected && byId[state.selected];
    box.replaceChildren();
    if (!n) {
      make('h2', {}, box, 'Select a node');
      make('p', {'class': 'note'}, box, 'Circles are features, diamonds are what the transcoders miss, squares are ' +
        'tokens and outputs. Its inputs and outputs appear here: orange raises, blue lowers. Arrow keys move along the ' +
        'strongest links, p pins.');
      return;
    }
    make('h2', {}, box, title(n));
    var facts = make('div', {'class': 'facts'}, box);
    make('span', {}, facts, where(n));
    function fact(name, value) {
      if (value === '' || value === undefined) return;
      make('b', {}, make('span', {}, facts, name + ' '), value);
    }
    fact('activation', n.raw.activation === undefined ? '' : fixed(n.raw.activation));
    if (n.kind !== 'target') fact('among the top', (100 * n.influence).toFixed(1) + ' % of influence');
    var about = n.place && extra.features[n.place];
    if (about) fact('fires on', (100 * about.density).toPrecision(2) + ' % of tokens');
    var pinned = state.pinned.indexOf(n.id) >= 0;
    var pin = make('button', {type: 'button', id: 'pin', 'aria-pressed': pinned}, box, pinned ? 'Pinned' : 'Pin');
    pin.addEventListener('click', function () { togglePin(n.id); });
    if (n.kind === 'feature') {
      var rename = make('button', {type: 'button', id: 'rename', style: 'margin-left:8px'}, box, 'Name it');
      rename.addEventListener('click', function () {
        var name = window.prompt('A name for this feature', title(n));
        if (name !== null) { state.names[n.place] = name; save(); draw(); panel(); subgraph(); }
      });
    }
    function on(l) { return now.on[l.s.id] && now.on[l.t.id]; }
    if (n.kind === 'feature' || n.kind === 'target')
      edges(box, 'Inputs', n.into.filter(on), 's', extra.bias[n.id]);
    if (n.kind !== 'target') edges(box, 'Outputs', n.onto.filter(on), 't', 0);
    if (!about) return;
    var two = make('div', {'class': 'two-lists'}, box);
    [['Logits it raises', about.raised], ['Logits it lowers', about.lowered]].forEach(function (part) {
      var half = make('div', {}, two);
      make('h3', {}, half, part[0]);
      var ul = make('ul', {'class': 'logits'}, half);
      part[1].forEach(function (pair) {
        var li = make('li', {}, ul);
        make('code', {}, li, shown(pair[0]));
        make('span', {}, li, fixed(pair[1]));
      });
    });
    make('h3', {}, box, 'Where it fires most');
    if (!about.contexts.length) make('p', {'class': 'empty'}, box, 'nowhere in the text that was read');
    var peak = Math.max.apply(null, about.contexts.map(function (c) { return c.acts[c.peak]; }).concat(1e-9));
    about.contexts.forEach(function (context) {
      var p = make('p', {'class': 'snippet'}, box);
      context.tokens.forEach(function (token, i) {
        var a = context.acts[i];
        make('i', {style: '--a:' + (a > 0 ? 0.1 + 0.7 * a / peak : 0).toFixed(2), title: fixed(a),
          'class': i === context.peak ? 'peak' : ''}, p, token.replace(/\n/g, '↵'));
      });
    });
  }

  // ---- pinned nodes and supernodes
  function togglePin(id) {
    var place = state.pinned.indexOf(id);
    if (place >= 0) {
      state.pinned.splice(place, 1);
      state.groups.forEach(function (g) { g.members = g.members.filter(function (m) { return m !== id; }); });
      state.groups = state.groups.filter(function (g) { return g.members.length; });
    } else state.pinned.push(id);
    save(); draw(); panel(); subgraph();
  }
  function grouped(id) { return state.groups.some(function (g) { return g.members.indexOf(id) >= 0; }); }
  function subgraph() {
    var chips = at('chips'), free = state.pinned.filter(function (id) { return byId[id] && !grouped(id); });
    chips.replaceChildren();
    state.groups.forEach(function (g, i) {
      var chip = make('span', {'class': 'chip group'}, chips);
      make('span', {'class': 'name', title: g.members.map(function (m) { return title(byId[m]); }).join('\n')}, chip,
        g.name + ' (' + g.members.length + ')');
      make('button', {type: 'button', 'aria-label': 'ungroup ' + g.name}, chip, '×').addEventListener('click',
        function () { state.groups.splice(i, 1); save(); subgraph(); });
    });
    free.forEach(function (id) {
      var chip = make('span', {'class': 'chip'}, chips), label = make('label', {}, chip);
      make('input', {type: 'checkbox', value: id, 'aria-label': 'pick ' + title(byId[id])}, label);
      make('button', {type: 'button', 'class': 'name'}, chip, title(byId[id])).addEventListener('click',
        function () { select(id, true); });
      make('button', {type: 'button', 'aria-label': 'unpin ' + title(byId[id])}, chip, '×').addEventListener('click',
        function () { togglePin(id); });
    });
    at('no-pins').hidden = state.pinned.length > 0;
    at('group-form').hidden = free.length < 1;
    sketch(free);
  }
  function sketch(free) {
    var box = at('sketch');
    var items = state.groups.map(function (g) {
      return {name: g.name, members: g.members.filter(function (m) { return byId[m]; }), group: true};
    }).concat(free.map(function (id) { return {name: title(byId[id]), members: [id], group: false}; }));
    box.replaceChildren();
    box.hidden = items.length < 2;
    if (items.length < 2) return;
    var rows = {};
    items.forEach(function (item) {
      function mean(f) { return item.members.reduce(function (a, m) { return a + f(byId[m]); }, 0) / item.members.length; }
      item.layer = Math.round(mean(function (n) { return n.layer; }));
      item.across = mean(function (n) { return n.position; });
      item.width = Math.max(60, Math.min(230, item.name.length * 7 + 20));
      (rows[item.layer] = rows[item.layer] || []).push(item);
    });
    var order = Object.keys(rows).map(Number).sort(function (a, b) { return b - a; }), widest = 0;
    order.forEach(function (layer, r) {
      var left = 14;
      rows[layer].sort(function (a, b) { return a.across - b.across; }).forEach(function (item) {
        item.x = left; item.y = 14 + r * 74; left += item.width + 26;
      });
      widest = Math.max(widest, left);
    });
    var svg = make('svg', {width: widest, height: order.length * 74, 'aria-label': 'pinned nodes and supernodes'});
    items.forEach(function (a) {
      items.forEach(function (b) {
        if (a === b) return;
        var sum = 0;
        links.forEach(function (l) {
          if (a.members.indexOf(l.s.id) >= 0 && b.members.indexOf(l.t.id) >= 0) sum += l.w;
        });
        if (!sum) return;
        var x1 = a.x + a.width / 2, y1 = a.y, x2 = b.x + b.width / 2, y2 = b.y + 28;
        make('path', {'class': 'link in ' + (sum > 0 ? 'plus' : 'minus'), 'stroke-width': 1.6,
          d: 'M' + x1 + ',' + y1 + 'C' + x1 + ',' + (y1 + y2) / 2 + ' ' + x2 + ',' + (y1 + y2) / 2 + ' ' + x2 + ',' + y2}, svg);
        make('text', {'class': 'weight', x: (x1 + x2) / 2 + 4, y: (y1 + y2) / 2}, svg, (sum > 0 ? '+' : '−') + fixed(Math.abs(sum)));
      });
    });
    items.forEach(function (item) {
      make('rect', {'class': item.group ? 'group' : '', x: item.x, y: item.y, width: item.width, height: 28, rx: 6}, svg);
      make('text', {x: item.x + 10, y: item.y + 18}, svg, cut(item.name, 30));
    });
    box.appendChild(svg);
  }
  at('group').addEventListener('click', function () {
    var picked = Array.prototype.slice.call(document.querySelectorAll('#chips input:checked'))
      .map(function (one) { return one.value; });
    if (!picked.length) { at('group-name').placeholder = 'tick some nodes first'; return; }
    state.groups.push({name: at('group-name').value.trim() || 'supernode ' + (state.groups.length + 1), members: picked});
    at('group-name').value = '';
    save(); subgraph();
  });

  // ---- selection, keys, state in the address
  function select(id, follow) {
    state.selected = id;
    if (id && now && !now.on[id]) draw(); else mark();
    panel(); save();
    var g = drawn[id];
    if (g && follow) g.scrollIntoView({block: 'nearest', inline: 'center'});
  }
  canvas.addEventListener('click', function (event) {
    var g = event.target.closest('.node');
    if (!g) { select(null); return; }
    if (event.shiftKey) togglePin(g.dataset.id); else select(g.dataset.id);
  });
  document.addEventListener('keydown', function (event) {
    if (/^(INPUT|TEXTAREA)$/.test(event.target.tagName) || event.metaKey || event.ctrlKey || event.altKey) return;
    var g = event.target.closest && event.target.closest('.node');
    if (g && (event.key === 'Enter' || event.key === ' ')) { event.preventDefault(); select(g.dataset.id); return; }
    if (event.key === 'Escape') { select(null); return; }
    var n = state.selected && byId[state.selected];
    if (!n) return;
    if (event.key === 'p') togglePin(n.id);
    function strongest(list, other) {
      var found = list.filter(function (l) { return now.on[l[other].id]; })
        .sort(function (a, b) { return Math.abs(b.w) - Math.abs(a.w); })[0];
      if (found) { event.preventDefault(); select(found[other].id, true); }
    }
    if (event.key === 'ArrowDown') strongest(n.into, 's');
    if (event.key === 'ArrowUp') strongest(n.onto, 't');
  });
  function save() {
    var kept = {s: state.selected, p: state.pinned, g: state.groups, n: state.names};
    var empty = !kept.s && !kept.p.length && !Object.keys(kept.n).length;
    try {
      history.replaceState(null, '', empty ? '#' : '#' + encodeURIComponent(JSON.stringify(kept)));
    } catch (error) { /* a page in a frame may not */ }
  }
  function restore() {
    try {
      var kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
      state.selected = byId[kept.s] ? kept.s : null;
      state.pinned = (kept.p || []).filter(function (id) { return byId[id]; });
      state.groups = (kept.g || []).map(function (g) {
        return {name: String(g.name), members: g.members.filter(function (m) { return state.pinned.indexOf(m) >= 0; })};
      }).filter(function (g) { return g.members.length; });
      Object.keys(kept.n || {}).forEach(function (place) { state.names[place] = String(kept.n[place]); });
    } catch (error) {
      state.pinned = doc.qParams.pinnedIds.filter(function (id) { return byId[id]; });
      state.groups = doc.qParams.supernodes.map(function (g) {
        return {name: g[0], members: g.slice(1).filter(function (m) { return byId[m]; })};
      }).filter(function (g) { return g.members.length; });
    }
  }

  // ---- sliders and the file
  function slider(id, key) {
    var input = at(id), out = at(id + '-value');
    input.value = state[key];
    function say() { out.textContent = (100 * state[key]).toFixed(0) + ' %'; }
    say();
    input.addEventListener('input', function () { state[key] = Number(input.value); say(); draw(); panel(); });
  }
  at('errors').addEventListener('change', function () { state.errors = this.checked; draw(); panel(); });
  at('download').addEventListener('click', function () {
    var copy = JSON.parse(JSON.stringify(doc));
    copy.qParams.pinnedIds = state.pinned;
    copy.qParams.supernodes = state.groups.map(function (g) { return [g.name].concat(g.members); });
    copy.nodes.forEach(function (n) {
      var place = byId[n.node_id] && byId[n.node_id].place;
      if (place && state.names[place]) n.clerp = state.names[place];
    });
    var link = make('a', {download: doc.metadata.slug + '.json',
      href: URL.createObjectURL(new Blob([JSON.stringify(copy, null, 1)], {type: 'application/json'}))}, document.body);
    link.click();
    link.remove();
  });

  restore();
  slider('node-threshold', 'node');
  slider('edge-threshold', 'edge');
  draw();
  panel();
  subgraph();
  if (!state.selected) {
    var first = nodes.filter(function (n) { return n.kind === 'target'; })[0];
    if (first && window.innerWidth > 900) select(first.id);
    else canvas.scrollLeft = canvas.scrollWidth;
  }
})();
