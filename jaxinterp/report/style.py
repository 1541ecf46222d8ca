"""The style sheet and the script of the report, as strings.

The page is complete without the script: it only shows one feature at a time, sorts the index, and listens to the keys.
"""

STYLE = """
:root{color-scheme:light dark;
--paper:#faf9f6;--card:#fff;--ink:#1c1f26;--soft:#555b66;--faint:#737985;--rule:#e5e2da;--grid:#eceae4;
--accent:#1d5c8f;--tint:#e9f0f6;--muted:#a3a9b3;--heat:236 122 22;--cool:58 118 205;--warn:#a63d2f;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,Charter,"Source Serif 4",Georgia,"Liberation Serif",serif;
--sans:-apple-system,BlinkMacSystemFont,"Segoe UI",Inter,Roboto,"Helvetica Neue","Noto Sans","Liberation Sans",Arial,
system-ui,sans-serif;
--mono:ui-monospace,"SF Mono",SFMono-Regular,Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{
--paper:#121417;--card:#1a1d22;--ink:#e6e5e1;--soft:#a9aeb8;--faint:#868d99;--rule:#2d3138;--grid:#272b31;
--accent:#7db8ea;--tint:#1f2c38;--muted:#646b77;--heat:240 134 40;--cool:92 150 236;--warn:#ef9a8d}}
*{box-sizing:border-box}
html{scroll-padding-top:64px;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 var(--sans)}
main,header.top,footer{max-width:1240px;margin:0 auto;padding:0 32px}
h1,h2,h3{font-family:var(--serif);font-weight:600;line-height:1.2;letter-spacing:-.01em}
h1{font-size:38px;margin:6px 0 6px;text-wrap:balance}
h2{font-size:25px;margin:0 0 6px}
h4{font-size:12.5px;font-weight:600;margin:0 0 8px;color:var(--soft)}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
p{margin:0 0 12px}
code,.mono{font-family:var(--mono);font-size:.9em}
section{padding:44px 0 0}
.lede{color:var(--soft);max-width:108ch;margin-bottom:20px}
.note{color:var(--faint);font-size:13px;max-width:120ch;margin:12px 0 0}
.empty{color:var(--faint);font-style:italic;margin:8px 0}
.warn{color:var(--warn)}

header.top{padding-top:52px}
.kicker{color:var(--accent);font-size:12.5px;font-weight:600;letter-spacing:.08em;text-transform:uppercase}
.subtitle{font-size:17px;color:var(--soft);margin:0 0 24px}
.summary{font:20px/1.5 var(--serif);max-width:88ch;margin:0 0 28px;padding-left:18px;
border-left:3px solid var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:12px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px 16px 13px}
.tile span{display:block;color:var(--soft);font-size:12.5px}
.tile b{display:block;font:600 27px/1.25 var(--serif);font-variant-numeric:lining-nums tabular-nums;margin:2px 0}
.tile small{display:block;color:var(--faint);font-size:12px;line-height:1.4}
nav.bar{position:sticky;top:0;z-index:5;background:var(--paper);border-bottom:1px solid var(--rule);margin-top:34px}
nav.bar div{max-width:1240px;margin:0 auto;padding:0 32px;display:flex;gap:26px;overflow-x:auto}
nav.bar a{padding:12px 0;color:var(--soft);font-size:13.5px;white-space:nowrap}
nav.bar a:hover{color:var(--ink);text-decoration:none;box-shadow:inset 0 -2px var(--accent)}

.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:18px 20px}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;margin-top:16px}
.card h3,.panel h3{font:600 14px/1.4 var(--sans);letter-spacing:0;margin:0 0 8px}
.card h3 small,.panel h3 small{font-weight:400;color:var(--faint);font-size:12.5px;margin-left:6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th{font-weight:500;color:var(--soft);text-align:right;white-space:nowrap}
td{text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.board{font-size:13.5px}
.board th,.board td{padding:8px 9px}
.board thead th{border-bottom:1px solid var(--rule);font-size:12.5px;vertical-align:bottom;cursor:help}
.board thead tr.groups th{border:0;padding-bottom:2px;color:var(--faint);font-size:11.5px;text-align:center;cursor:auto}
.board thead tr.groups th+th+th{border-left:1px solid var(--rule)}
.board tbody td{border-bottom:1px solid var(--grid);vertical-align:top}
.board tbody tr:last-child td{border-bottom:0}
.board .start{border-left:1px solid var(--grid)}
.board td small{display:block;color:var(--faint);font-size:11px;line-height:1.3}
.board tr.first td{background:var(--tint)}
.board tr.first td:first-child{box-shadow:inset 3px 0 var(--accent);font-weight:600}
.board td:first-child,.board th:first-child{position:sticky;left:0;background:var(--card);padding-left:14px}
.board tr.first td:first-child{background:var(--tint)}
.board td:last-child,.board th:last-child{padding-right:16px}
.board .same{color:var(--faint)}
.board td.words{text-align:left}
.wide{margin-top:16px}
.board th i{font-style:normal;color:var(--faint)}

svg.plot{display:block;width:100%;height:auto;font-family:var(--sans);overflow:visible}
.plot text{font-size:11.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
.plot .tick{fill:var(--faint);font-size:11px}
.plot .below{text-anchor:middle;dominant-baseline:hanging}
.plot .aside{text-anchor:end}
.plot .axis-label{fill:var(--faint);font-size:11px}
.plot path{fill:none}
.plot .grid{stroke:var(--grid)}
.plot .axis{stroke:var(--muted)}
.plot .line{stroke:var(--accent);stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}
.plot .reference{stroke:var(--muted);stroke-dasharray:3 3}
.plot .reference-label{font-size:11px;fill:var(--soft);paint-order:stroke;stroke:var(--card);stroke-width:4px;
stroke-linejoin:round}
.plot .bar{fill:var(--accent);opacity:.82}
.plot .bar:hover{opacity:1}
.plot .apart{fill:var(--muted)}
.plot .rug{stroke:rgb(var(--heat));opacity:.75}
.plot .interval{stroke:var(--muted);stroke-width:2}
.plot .dot{fill:var(--muted);stroke:var(--card);stroke-width:1.5}
.plot .interval.strong{stroke:var(--accent)}
.plot .dot.strong{fill:var(--accent)}
.plot .name{font-size:12.5px}
.plot .value{font-size:12px}
.plot .name.strong,.plot .value.strong{fill:var(--ink);font-weight:600}
.plot .series{stroke:var(--hue);stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round;opacity:.8}
.plot .series.dashed{stroke-dasharray:5 4}
.plot .mark{fill:var(--hue);stroke:var(--card);stroke-width:1}
.plot .cloud{stroke:var(--hue);stroke-width:3;stroke-linecap:round;opacity:.35}
.plot .leader{stroke:var(--hue);stroke-width:.8;opacity:.5}
.plot .legend-name{font-size:12px;fill:var(--ink)}
.plot .strong .series{stroke-width:2.6;opacity:1}
.plot .strong .legend-name{font-weight:600}
.h0{--hue:#1d5c8f}.h1{--hue:#c2571a}.h2{--hue:#2f7d4f}.h3{--hue:#8a4d9e}.h4{--hue:#a3851c}.h5{--hue:#5f6673}
@media (prefers-color-scheme:dark){
.h0{--hue:#7db8ea}.h1{--hue:#f09a5d}.h2{--hue:#72c795}.h3{--hue:#cf9be0}.h4{--hue:#dcc05a}.h5{--hue:#a9aeb8}}
.plot .hover rect{fill:transparent}
.plot .hover circle{fill:var(--accent);opacity:0}
.plot .hover:hover circle{opacity:1}

.features{display:grid;grid-template-columns:392px minmax(0,1fr);gap:16px;align-items:start}
.index{padding:0;position:sticky;top:60px;max-height:calc(100vh - 76px);overflow:auto}
.index table{font-size:13px}
.index th{position:sticky;top:0;background:var(--card);padding:0;font-size:12px;box-shadow:inset 0 -1px var(--rule)}
.index th span,.index th button{display:block;width:100%;padding:10px 8px;font:inherit;color:inherit;text-align:inherit}
.index th button{background:none;border:0;cursor:pointer}
.index th button:hover{color:var(--ink)}
.index th[aria-sort=ascending] button::after{content:" ↑"}
.index th[aria-sort=descending] button::after{content:" ↓"}
.index td{padding:5px 8px;border-bottom:1px solid var(--grid)}
.index td:first-child,.index th:first-child>*{padding-left:16px}
.index td:last-child,.index th:last-child{text-align:left}
.index td:last-child{max-width:104px;overflow:hidden;text-overflow:ellipsis;font-family:var(--mono);font-size:12px}
.index tbody tr:hover td{background:var(--tint)}
.index tr.on td{background:var(--tint)}
.index tr.on td:first-child{box-shadow:inset 3px 0 var(--accent)}
.index tr.on a{font-weight:600}
.feature{margin-bottom:16px;padding:22px 26px 24px}
.js .feature{display:none}
.js .feature.on{display:block}
.feature header{display:flex;justify-content:space-between;align-items:baseline;gap:16px}
.feature h3.name{font:600 22px/1.2 var(--serif);margin:0}
.feature h3.name code{font-size:.72em;font-weight:400;color:var(--soft);margin-left:8px}
.step{display:none;font-size:13px;color:var(--faint);white-space:nowrap}
.js .step{display:block}
.step a{padding:2px 7px}
.facts{display:flex;flex-wrap:wrap;gap:4px 26px;margin:8px 0 18px;font-size:13px;color:var(--soft)}
.facts b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.contexts{border-top:1px solid var(--grid);margin:0 0 22px;padding:0;list-style:none}
.contexts li{display:grid;grid-template-columns:52px minmax(0,1fr);border-bottom:1px solid var(--grid);padding:8px 0}
.contexts li>b{font:500 12.5px/1.75 var(--sans);color:var(--soft);font-variant-numeric:tabular-nums}
.snippet{font-size:14px;line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere}
.snippet i,.snippet mark{font-style:normal;border-radius:3px;padding:1.5px 0;color:inherit;unicode-bidi:isolate;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.snippet mark{font-weight:600;margin:0 1.5px;padding:1.5px 1px;background:none;box-shadow:0 0 0 1.5px rgb(var(--heat))}
.snippet mark.n{box-shadow:0 0 0 1.5px rgb(var(--cool))}
.w{color:var(--faint);font-weight:400}
.snippet i .w,.snippet mark .w{color:inherit;opacity:.7}
HEAT
.panels{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:22px 34px}
.logits table,.neurons table{font-size:12.5px}
.logits td{padding:2.5px 0}
.logits td:first-child{font-family:var(--mono);font-size:12px;max-width:1px;width:99%;overflow:hidden;
text-overflow:ellipsis}
.logits td:last-child{padding-left:8px;color:var(--soft)}
.neurons th,.neurons td{padding:3.5px 0;border-bottom:1px solid var(--grid)}
.neurons th{font-size:12px}
.logits td[style]::after,.neurons td[style]::after{content:"";display:inline-block;height:7px;margin-left:10px;
width:64px;border-radius:2px;background:linear-gradient(var(--fill),var(--fill)) no-repeat var(--grid);
background-size:calc(var(--w)*1%) 100%;--fill:rgb(var(--bar)/.8)}
td.n{--bar:var(--cool)}td{--bar:var(--heat)}
.legend{display:flex;align-items:center;gap:8px;color:var(--faint);font-size:12px;margin:0 0 10px}
.legend .ramp{display:inline-block;width:120px;height:9px;border-radius:3px;
background:linear-gradient(90deg,rgb(var(--heat)/.06),rgb(var(--heat)/.8))}
kbd{font:12px var(--mono);border:1px solid var(--rule);border-radius:4px;padding:1px 5px;background:var(--card)}
.js-only{display:none}
.js .js-only{display:inline}

.read{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px 40px;margin:0}
.read div{break-inside:avoid}
.read dt{font-weight:600;font-size:14px}
.read dd{margin:2px 0 0;color:var(--soft);font-size:14px}
.run{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:14px 32px;margin:0}
.run div{min-width:0}
.run .wide{grid-column:1/-1}
.run dt{color:var(--faint);font-size:12px}
.run dd{margin:0;font-size:13.5px;overflow-wrap:anywhere}
.run .wide dd{font-family:var(--mono);font-size:12.5px;background:var(--paper);border:1px solid var(--rule);
border-radius:6px;padding:8px 12px;margin-top:4px;white-space:pre-wrap}
footer{color:var(--faint);font-size:12.5px;padding-top:36px;padding-bottom:48px}

@media (max-width:1120px){
.tiles{grid-template-columns:repeat(3,1fr)}
.features{grid-template-columns:minmax(0,1fr)}
.index{position:static;max-height:330px}
.index td:last-child{max-width:none}
}
@media (max-width:820px){
main,header.top,footer,nav.bar div{padding-left:20px;padding-right:20px}
.two,.read{grid-template-columns:minmax(0,1fr)}
.run{grid-template-columns:repeat(2,minmax(0,1fr))}
h1{font-size:31px}
.two .plot{max-width:600px;margin:0 auto}
#density .plot text{font-size:16px}
.summary{font-size:18px}
}
@media (max-width:600px){
.tiles{grid-template-columns:repeat(2,1fr)}
.panels,.run{grid-template-columns:minmax(0,1fr)}
.feature{padding:18px 16px}
:has(> svg.plot){overflow-x:auto}
.two .plot,svg.plot{width:auto;max-width:none}
#density .plot text{font-size:11.5px}
}
@media print{
nav.bar,.step,.js .js-only{display:none}
.js .feature{display:block;break-inside:avoid}
.index{position:static;max-height:none}
.features{display:block}
}
""".replace(
    "HEAT",
    "\n".join(
        f".snippet .a{level}{{background:rgb(var(--heat)/{0.06 + 0.082 * level:.2f})}}"
        f".snippet .n{level}{{background:rgb(var(--cool)/{0.06 + 0.066 * level:.2f})}}"
        for level in range(1, 10)
    ),
)

# Set before the body is drawn, so that the page does not first show every feature and then hide all but one.
EARLY_SCRIPT = "document.documentElement.classList.add('js')"

SCRIPT = """
(function () {
  'use strict';
  var body = document.querySelector('.index tbody');
  if (!body) return;
  var pages = document.getElementById('pages');
  var current = null;

  function rows() { return Array.prototype.slice.call(body.rows); }
  function target(row) { return row.querySelector('a').getAttribute('href').slice(1); }

  function show(id, follow) {
    var row = rows().find(function (one) { return target(one) === id; });
    var page = document.getElementById(id);
    if (!row || !page) return false;
    document.querySelectorAll('.feature.on, .index tr.on').forEach(function (one) { one.classList.remove('on'); });
    row.classList.add('on');
    page.classList.add('on');
    current = id;
    var all = rows(), place = all.indexOf(row);
    page.querySelector('.place').textContent = (place + 1) + ' of ' + all.length;
    var pane = document.querySelector('.index');
    var box = row.getBoundingClientRect(), frame = pane.getBoundingClientRect();
    if (box.top < frame.top + 36) pane.scrollTop -= frame.top + 36 - box.top;
    if (box.bottom > frame.bottom) pane.scrollTop += box.bottom - frame.bottom;
    var top = pages.getBoundingClientRect().top;
    if (follow && (top < 0 || top > window.innerHeight * 0.6)) page.scrollIntoView({block: 'start'});
    return true;
  }

  function go(id) {
    if (show(id, true)) history.replaceState(null, '', '#' + id);
  }

  function move(by) {
    var all = rows(), ids = all.map(target), next = ids.indexOf(current) + by;
    if (next >= 0 && next < ids.length) go(ids[next]);
  }

  document.addEventListener('click', function (event) {
    var link = event.target.closest('a[href^="#feature-"], a[data-move]');
    var row = event.target.closest('.index tbody tr');
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    if (link && link.dataset.move) { event.preventDefault(); move(Number(link.dataset.move)); }
    else if (link || row) { event.preventDefault(); go(link ? link.getAttribute('href').slice(1) : target(row)); }
  });

  document.addEventListener('keydown', function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    var box = document.querySelector('.features').getBoundingClientRect();
    if (box.bottom < 0 || box.top > window.innerHeight) return;
    if (event.key === 'ArrowRight' || event.key === 'j') { event.preventDefault(); move(1); }
    if (event.key === 'ArrowLeft' || event.key === 'k') { event.preventDefault(); move(-1); }
  });

  document.querySelectorAll('.index th').forEach(function (head, column) {
    var label = head.querySelector('span'), button = document.createElement('button');
    button.type = 'button';
    button.textContent = label.textContent;
    button.title = 'Sort by ' + label.textContent;
    head.replaceChild(button, label);
    button.addEventListener('click', function () {
      var text = head.dataset.sort === 'text';
      var now = head.getAttribute('aria-sort');
      var down = now ? now === 'ascending' : !text && column > 0;
      document.querySelectorAll('.index th').forEach(function (one) { one.removeAttribute('aria-sort'); });
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      var key = function (row) {
        var value = row.cells[column].dataset.value;
        return text ? row.cells[column].textContent : value === '' ? NaN : Number(value);
      };
      rows().sort(function (a, b) {
        var x = key(a), y = key(b);
        if (!text && (x !== x || y !== y)) return (x !== x) - (y !== y);
        var order = text ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      }).forEach(function (row) { body.appendChild(row); });
      if (current) show(current, false);
    });
  });

  window.addEventListener('hashchange', function () { show(location.hash.slice(1), true); });
  if (!show(location.hash.slice(1), true)) show(target(body.rows[0]), false);
})();
"""
